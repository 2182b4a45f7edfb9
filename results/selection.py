"""What it is worth to select the epoch on few held-out examples: a table of docs/photographs_measured.md.

    python results/selection.py CALTECH_FEATURES.npz FRUITS_FEATURES.npz RECIPE SET ..

Sets and splits are those of frozen_default.py. A tenth of each class of the training rows is held out; the recipe
trains on the rest, once looking at the held-out rows after every epoch and once, bit for bit alike, at the test rows.
Four ways to choose the epoch by the former are scored by the latter: the last, the first of the highest accuracy, of
the highest accuracy that of the lowest loss (what `train` does), and the lowest loss.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from frozen_default import NAMES, sets

import pspinal_jax
from pspinal_jax.data.dataset import split_by_class


def curve(recipe, seed, train, looked_at):
    """Accuracy and loss [epochs, 2] on the rows `looked_at`."""
    with tempfile.TemporaryDirectory() as place:
        data, run = Path(place, "data.npz"), Path(place, "run")
        arrays = {"train_images": train[0], "train_labels": train[1]}
        np.savez(data, **arrays, test_images=looked_at[0], test_labels=looked_at[1])
        settings = {"data__path": data, "data__num_classes": int(train[1].max()) + 1, "seed": seed}
        pspinal_jax.train(recipe, workdir=run, protocol="paper", checkpoint_seconds=1e3, **settings)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return np.array([(line["test_accuracy"], line["test_loss"]) for line in lines])


def main():
    """Train everything and print the table's rows."""
    caltech, fruits, recipe, *names = sys.argv[1:]
    found, held_out = {}, {}
    for name, split, inputs, labels, train, test in sets(caltech, fruits):
        if name not in names:
            continue
        kept, held = (train[rows] for rows in split_by_class(labels[train], 0.1, split))
        here = inputs[kept], labels[kept]
        seen, true = (curve(recipe, split, here, (inputs[rows], labels[rows])) for rows in (held, test))
        tied = np.flatnonzero(seen[:, 0] == seen[:, 0].max())
        ways = {
            "the last": len(seen) - 1,
            "accuracy, the first of ties": tied[0],
            "accuracy, ties by loss": tied[np.argmin(seen[tied, 1])],
            "loss": np.argmin(seen[:, 1]),
        }
        held_out[name] = len(held)
        for way, epoch in ways.items():
            found.setdefault((name, way), []).append((epoch + 1, *true[epoch]))
    for (name, way), values in found.items():
        epochs, accuracy, loss = np.transpose(values)
        chosen = ", ".join(f"{epoch:.0f}" for epoch in epochs)
        print(
            f"| {NAMES[name]} | {held_out[name]} | {way} | {chosen} | {100 * accuracy.mean():.2f} | {loss.mean():.4f} |"
        )


if __name__ == "__main__":
    main()
