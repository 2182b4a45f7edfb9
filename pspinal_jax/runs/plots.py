"""Pictures of a run: curves by epoch, and the confusion matrix."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from pspinal_jax.runs.directory import whole_file

_MOST_NUMBERED_CLASSES = 30
"""Above so many classes the confusion matrix shows colours only."""


def plot_curves(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and accuracy by epoch: the mean over seeds, and their range where there is more than one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    epochs = np.arange(1, len(lines) + 1)
    for axis, kind, scale in ((left, "loss", 1.0), (right, "accuracy", 100.0)):
        for split in ("train", "validation", "test"):
            key = f"{split}_{kind}"
            here = np.array([key in line for line in lines], bool)
            if not here.any():
                continue
            values = scale * np.array([np.atleast_1d(line[key]) for line in lines if key in line])
            axis.plot(epochs[here], values.mean(1), marker=".", label=split)
            if values.shape[1] > 1:
                axis.fill_between(epochs[here], values.min(1), values.max(1), alpha=0.2)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    left.set_ylabel("loss (nats)")
    right.set_ylabel("accuracy (%)")
    figure.suptitle(title)
    _save(figure, path)


def plot_confusion(matrix: np.ndarray, class_names: list[str], path: Path, title: str) -> None:
    """The confusion matrix [C, C], rows the true class; colours are shares of the row."""
    size = float(np.clip(0.45 * len(class_names), 5, 16))
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the true class")
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    axis.set_title(title)
    if len(class_names) <= _MOST_NUMBERED_CLASSES:
        axis.set_xticks(range(len(class_names)), class_names, rotation=90)
        axis.set_yticks(range(len(class_names)), class_names)
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    try:
        with whole_file(path) as part:
            figure.savefig(part, dpi=110, format="png")
    finally:
        plt.close(figure)
