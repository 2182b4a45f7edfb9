"""Parity with PyTorch where torch is not installed: its results, written down by make_golden_head.py."""

import pathlib

import jax
import numpy as np
import pytest
from heads_support import COMPILE_FAST, IMPLEMENTATIONS, abstract_variables, assert_tree_close

from pspinal_jax import ProgressiveSpinalHead, pack_batch_stats, pack_params, unpack_batch_stats

GOLDEN = pathlib.Path(__file__).with_name("golden_head.npz")


def as_tree(vector, like):
    """The tree shaped as `like` whose leaves are, one after the other, `vector`."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    assert ends[-1] == vector.size
    parts = np.split(vector, ends[:-1])
    return structure.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def golden_case(norm, implementation="unrolled"):
    """(head, variables, the case's arrays)."""
    with np.load(GOLDEN) as file:
        arrays = {name.removeprefix(f"{norm}/"): file[name] for name in file if name.startswith((f"{norm}/", "sizes"))}
    num_classes, (width, num_layers) = arrays["weights"].shape[1], map(int, arrays["sizes"])
    head = ProgressiveSpinalHead(
        num_classes, width, num_layers, 0.0, norm=norm, implementation=implementation, param_dtype=np.float64
    )
    with jax.enable_x64(True):
        like = abstract_variables(head, arrays["features"].shape[1], np.float64)
    return head, as_tree(arrays["variables"], like), arrays


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_logits_gradients_and_statistics_are_torchs(norm, mode, packed, implementation):
    head, variables, arrays = golden_case(norm, implementation)

    def loss(params, features):
        stats = variables.get("batch_stats", {})
        if packed:
            params, stats = pack_params(params), pack_batch_stats(stats)
        logits, new = head.apply(
            {"params": params, "batch_stats": stats}, features, train=mode == "train", mutable=["batch_stats"]
        )
        stats = new.get("batch_stats", {})
        return (arrays["weights"] * logits).sum(), (logits, unpack_batch_stats(stats) if packed else stats)

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=COMPILE_FAST)
        (of_params, of_features), (logits, stats) = gradient(variables["params"], arrays["features"])

    assert_tree_close(logits, arrays[f"{mode}/logits"], 1e-9)
    rest = {"params_gradient": of_params, "features_gradient": of_features, "batch_stats": stats}
    expected = as_tree(arrays[f"{mode}/rest"], rest)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected["params_gradient"]))
    # Batch norm makes some gradients zero but for rounding, which has no scale of its own.
    assert_tree_close(rest, expected, 1e-9, floor=lambda path: 0.01 * largest)


def test_the_golden_file_would_show_swapped_buffers():
    # Fresh from torch a norm is 1/0/0/1 and forgives much.
    _, variables, _ = golden_case("batch")
    for layer, running in variables["batch_stats"].items():
        norm, running = variables["params"][layer]["norm"], running["norm"]
        buffers = [norm["scale"], norm["bias"], running["mean"], running["var"]]
        assert np.unique(buffers).size == 4 * 3
