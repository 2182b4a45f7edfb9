"""What `pspinal_jax.fit` takes for an epoch of the row MNIST beside the recipe mnist-paper, which `train` runs.

  python results/fit_and_recipe.py mnist.npz [--epochs 4] [--rounds 3]

Both train the same model with the same settings in turn. The seconds of an epoch are those of the clock until its last
step is done (block_until_ready); the first epoch is left out, and the fastest counts. Beside them stands the processor
time of an epoch, the difference between trainings of `--epochs` epochs and of one, which other work on the machine does
not change much.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
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


def processor_seconds(train, path, epochs):
    """(processor seconds of an epoch, examples per second, test accuracy)."""
    used = []
    for count in (2, epochs + 2):  # two, since the first is not timed
        start = time.process_time()
        found = train(path, count)
        used.append(time.process_time() - start)
    return (used[1] - used[0]) / epochs, *found


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for train in (by_recipe, by_fit):
        train(args.data, 2)  # compiles, and fills the cache that `train` turns on
    found = {by_fit: [], by_recipe: []}
    for index in range(args.rounds):
        for train in (by_fit, by_recipe) if index % 2 else (by_recipe, by_fit):
            found[train].append(processor_seconds(train, args.data, args.epochs))
            seconds, rate, accuracy = found[train][-1]
            print(f"{train.__name__}: {seconds:.2f} s, {rate:,.0f} examples/s, accuracy {accuracy:.4f}", flush=True)
    seconds, rates = ({train: np.array(each)[:, index] for train, each in found.items()} for index in range(2))
    ratio = np.median(seconds[by_fit]) / np.median(seconds[by_recipe])
    print(f"processor time of fit / of the recipe: {ratio:.3f}")
    print(f"clock time of fit / of the recipe: {max(rates[by_recipe]) / max(rates[by_fit]):.3f}")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
