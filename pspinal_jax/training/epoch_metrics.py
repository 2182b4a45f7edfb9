"""What an epoch reports: means over its examples, by seed."""

from typing import Any

import numpy as np

from pspinal_jax.training.stages import TrainingProgress, TrainingStage


def epoch_line(
    stage: TrainingStage,
    progress: TrainingProgress,
    totals: dict[str, list[Any]],
    evaluation: dict[str, list[float]],
    *,
    learning_rates: list[float] | None,
    compile_seconds: float,
) -> dict[str, Any]:
    """A line of metrics.jsonl; values that differ by seed are lists where there is more than one.

    Returns:
      stage, epoch (from 1), step (within the stage), learning_rate (of the epoch's last step, if known); train_loss and
      train_accuracy as trained, with label smoothing, class weights, mixing and dropout; loss and accuracy on what the
      stage evaluates, and balanced accuracy where the epoch is selected by it; seconds of training, examples_per_second
      over all seeds, compile_seconds (spent before this epoch, not part of seconds).
    """
    count = np.maximum(np.asarray(totals["count"], float), 1.0)
    step = progress.serial if stage.steps_per_epoch is None else progress.epoch * stage.steps_per_epoch
    line = {
        "stage": stage.name,
        "epoch": progress.epoch,
        "step": step,
        **({} if learning_rates is None else {"learning_rate": per_seed(learning_rates)}),
        **training_means(totals),
    }
    for name, values in evaluation.items():
        line[f"{stage.evaluates}_{name}"] = per_seed(values)
    return line | {
        "seconds": round(progress.seconds, 4),
        "examples_per_second": round(float(count.sum()) / progress.seconds, 1),
        "compile_seconds": round(compile_seconds, 3),
    }


def training_means(totals: dict[str, list[Any]]) -> dict[str, Any]:
    """Loss and metrics as means over the examples trained on, by name: train_loss, train_accuracy, .."""
    count = np.maximum(np.asarray(totals["count"], float), 1.0)
    sums = {name: values for name, values in totals.items() if name not in ("count", "bad_step", "skipped")}
    ordered = ["loss", *(name for name in sums if name != "loss")]
    return {f"train_{metric_name(name)}": per_seed((np.asarray(sums[name]) / count).tolist()) for name in ordered}


def metric_name(name: str) -> str:
    """What the mean of a sum is called."""
    return "accuracy" if name == "correct" else name


def balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> list[float]:
    """The mean over classes of the part of each that was predicted right.

    Args:
      predictions: classes, integers [K, N].
      labels: integers [N]; classes without an example are left out.

    Returns:
      K numbers, 0 .. 1.
    """
    right = np.stack([(predictions == label)[:, labels == label].mean(1) for label in np.unique(labels)])
    return np.asarray(right.mean(0)).tolist()


def per_seed(values: list[Any]) -> Any:
    """The value itself for one seed, the list for more."""
    return values[0] if len(values) == 1 else values
