"""The numbers that a run reports: an epoch's line, and mean and spread over seeds."""

# DOC of runs/tensorboard: """TensorBoard events of a run, written with tensorboardX (no TensorFlow)."""

# DOC of runs/plots: """Pictures of a run: curves by epoch, and the confusion matrix."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from pspinal_jax.errors import UsageError
from pspinal_jax.runs.directory import whole_file
from pspinal_jax.runs.progress import Stage, TrainingProgress


def epoch_line(
    stage: Stage,
    position: TrainingProgress,
    totals: dict[str, list[Any]],
    evaluation: dict[str, list[float]],
    *,
    learning_rates: list[float],
    compile_seconds: float,
) -> dict[str, Any]:
    """A line of metrics.jsonl; values that differ by seed are lists where there is more than one.

    Returns:
      stage, epoch (from 1), step (within the stage), learning_rate (of the epoch's last step), train_loss (nats, with
      label smoothing and dropout as trained), train_accuracy, loss and accuracy on what the stage evaluates, seconds of
      training, examples_per_second over all seeds, compile_seconds (spent before this epoch, not part of seconds).
    """
    count = np.maximum(np.asarray(totals["count"], float), 1.0)
    line = {
        "stage": stage.name,
        "epoch": position.epoch,
        "step": position.epoch * stage.steps_per_epoch,
        "learning_rate": per_seed(learning_rates),
        "train_loss": per_seed((np.asarray(totals["loss"]) / count).tolist()),
        "train_accuracy": per_seed((np.asarray(totals["correct"]) / count).tolist()),
    }
    for name, values in evaluation.items():
        line[f"{stage.evaluates}_{name}"] = per_seed(values)
    return line | {
        "seconds": round(position.seconds, 4),
        "examples_per_second": round(count.sum() / position.seconds, 1),
        "compile_seconds": round(compile_seconds, 3),
    }


def per_seed(values: list[Any]) -> Any:
    """The value itself for one seed, the list for more."""
    return values[0] if len(values) == 1 else values


def summary(values: list[float]) -> dict[str, Any]:
    """mean, std (of the sample; null for one value) and each."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread, "each": list(values)}


def check_installed() -> None:
    """Raise UsageError, naming the extra, where tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UsageError("--tensorboard needs tensorboardX; in the checkout: pip install '.[tensorboard]'") from None


def write_events(lines: list[dict[str, Any]], directory: Path) -> None:
    """Write every line of metrics.jsonl as scalars by step, one curve per stage; several seeds as their mean."""
    from tensorboardX import SummaryWriter

    for stage in dict.fromkeys(line["stage"] for line in lines):
        with SummaryWriter(str(directory / stage)) as writer:
            for line in (line for line in lines if line["stage"] == stage):
                for key, value in line.items():
                    if key not in ("stage", "step"):
                        writer.add_scalar(key, float(np.mean(value)), line["step"])


matplotlib.use("Agg")


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
