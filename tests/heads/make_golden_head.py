"""Writes golden_head.npz, PyTorch's results on the head's equation, for the parity test that runs without torch.

    python tests/heads/make_golden_head.py

Needs torch. Arrays are named CASE/PART, in float64: `variables`, `features` and `weights` are what went in, and under
`train` and `eval` is what torch_head.results made of it. A tree is stored as one vector, its leaves one after the other
in jax's order (which is sorted by name): a file of a hundred small arrays would be mostly headers.
"""

import pathlib

import jax
import numpy as np
from heads_support import random_variables
from torch_head import results

from pspinal_jax import ProgressiveSpinalHead

GOLDEN = pathlib.Path(__file__).with_name("golden_head.npz")
FEATURES, WIDTH, LAYERS, CLASSES, ROWS = 5, 3, 3, 4, 6


def as_vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def main():
    arrays = {}
    with jax.enable_x64(True):
        for seed, norm in enumerate([None, "batch"]):
            rng = np.random.default_rng(seed)
            head = ProgressiveSpinalHead(CLASSES, WIDTH, LAYERS, norm=norm, param_dtype=np.float64)
            variables = random_variables(head, FEATURES, rng, np.float64)
            features = rng.standard_normal((ROWS, FEATURES))
            weights = rng.standard_normal((ROWS, CLASSES))
            case = {"features": features, "weights": weights, "variables": as_vector(variables)}
            for mode in ("train", "eval"):
                parts = results(head, variables, features, weights, train=mode == "train")
                case[f"{mode}/logits"] = parts["logits"]
                case[f"{mode}/rest"] = as_vector({name: part for name, part in parts.items() if name != "logits"})
            arrays |= {f"{norm}/{part}": array for part, array in case.items()}
    np.savez_compressed(GOLDEN, sizes=[WIDTH, LAYERS], **arrays)
    print(f"{GOLDEN}: {len(arrays) + 1} arrays, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
