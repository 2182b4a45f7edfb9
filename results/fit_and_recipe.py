"""What `pspinal_jax.fit` takes for an epoch of the row MNIST beside the recipe mnist-paper, which `train` runs.

  python results/fit_and_recipe.py mnist.npz [--epochs 4] [--rounds 3]

Both train the same model with the same settings, in turn. The first epoch of a training, which may hold what is left
of compiling, is left out, and its fastest one counts: other work on the machine only ever makes one slower. The seconds
of an epoch end when its last step is done (block_until_ready). The figure is the ratio of the fastest of all rounds.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pspinal_jax


class Net(nn.Module):
    """The model of the recipe, as somebody would write it who has a module of their own."""

    @nn.compact
    def __call__(self, images, train):
        """Logits of uint8 images [N, 28, 28, 1]."""
        x = (images.astype(jnp.float32) / 255 - 0.1307) / 0.3081
        head = pspinal_jax.ProgressiveSpinalHead(num_classes=10, layer_width=128, norm="batch")
        return head(x.reshape(len(x), -1), train=train)


def by_fit(path, epochs):
    """(examples per second, test accuracy) of `fit`."""
    data = np.load(path)
    train, test = ((data[f"{split}_images"], data[f"{split}_labels"]) for split in ("train", "test"))
    optimizer = optax.sgd(1e-3, momentum=0.5)
    result = pspinal_jax.fit(Net(), train, validation=test, optimizer=optimizer, epochs=epochs, batch_size=64)
    return speed(result.history), result.history[-1]["validation_accuracy"]


def by_recipe(path, epochs):
    """(examples per second, test accuracy) of the recipe."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        run = pspinal_jax.train("mnist-paper", data__path=path, epochs=epochs, workdir=Path(folder) / "run")
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return speed(lines), lines[-1]["test_accuracy"]


def speed(lines):
    """Of the fastest epoch but the first."""
    return max(line["examples_per_second"] for line in lines[1:])


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    fastest = {by_fit: 0.0, by_recipe: 0.0}
    for index in range(args.rounds):
        order = (by_fit, by_recipe) if index % 2 else (by_recipe, by_fit)
        for each in order:
            found, accuracy = each(args.data, args.epochs)
            fastest[each] = max(fastest[each], found)
            print(f"{each.__name__}: {found:,.0f} examples/s, test accuracy {accuracy:.4f}", flush=True)
    print(f"time of fit / time of the recipe: {fastest[by_recipe] / fastest[by_fit]:.3f}")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
