"""The numbers that a run reports: an epoch's line, and mean and spread over seeds."""

from typing import Any

import numpy as np

from pspinal_jax.runs.stages import Position, Stage


def epoch_line(
    stage: Stage,
    position: Position,
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
