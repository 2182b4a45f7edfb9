"""What an epoch reports: means over its examples, by seed; and the lines of all epochs as a table and a figure."""

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from pspinal_jax.training.stages import TrainingProgress, TrainingStage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SPLITS = ("train", "validation", "test")
_MAX_POINTS = 1000
"""Of a curve: more of them lie within a line's width and make the drawing large."""


class History(list[dict[str, Any]]):
    """A dict for each epoch: stage, epoch, step, train_loss, validation_loss, .., seconds; lists by seed for K seeds.

    In a notebook it shows itself as a table.
    """

    def to_pandas(self) -> Any:
        """As a pandas.DataFrame with a row for each epoch."""
        from pandas import DataFrame

        return DataFrame(list(self))

    def plot(self) -> "Figure":
        """Loss and metrics by epoch as a matplotlib Figure; of K seeds their mean and range."""
        from matplotlib.figure import Figure

        names = self._metrics()
        figure = Figure(figsize=(5 * max(1, len(names)), 4), layout="constrained")
        self.draw(figure, names)
        return figure

    def draw(self, figure: "Figure", names: list[str]) -> None:
        """Draw the metrics `names` into `figure`, one beside the other."""
        epochs = self._epochs()
        shown = np.unique(np.linspace(0, max(0, len(self) - 1), _MAX_POINTS).round().astype(int))[: len(self)]
        for axis, name in zip(np.ravel(figure.subplots(1, max(1, len(names)))), names, strict=False):
            percent = name.endswith("accuracy")
            for split in _SPLITS:
                here = [index for index in shown if f"{split}_{name}" in self[index]]
                if not here:
                    continue
                values = np.array([np.atleast_1d(self[index][f"{split}_{name}"]) for index in here], float)
                values *= 100 if percent else 1
                axis.plot(epochs[here], values.mean(1), marker=".", label=split)
                if values.shape[1] > 1:
                    axis.fill_between(epochs[here], values.min(1), values.max(1), alpha=0.2)
            axis.set_xlabel("epoch")
            axis.set_ylabel(f"{name} (%)" if percent else name)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend()

    def summary(self) -> str:
        """The last epoch on one line."""
        if not self:
            return "no epochs"
        means = ", ".join(f"{name} {_shown(value)}" for name, value in self[-1].items() if _is_mean(name))
        return f"{len(self)} epochs: {means}"

    def _repr_html_(self) -> str:
        names = [name for name in dict.fromkeys(name for line in self for name in line) if _is_mean(name)]
        names = [*(["stage"] if len({line["stage"] for line in self}) > 1 else []), "epoch", *names]
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(_shown(line.get(name)))}</td>' for name in names)}</tr>" for line in self
        )
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _metrics(self) -> list[str]:
        found = {name.split("_", 1)[1]: None for line in self for name in line if _is_mean(name)}
        return list(found)

    def _epochs(self) -> np.ndarray:
        """The epoch of each line, counted on from stage to stage."""
        numbers, before = [], 0
        for stage in dict.fromkeys(line["stage"] for line in self):
            here = [line["epoch"] for line in self if line["stage"] == stage]
            numbers += [before + epoch for epoch in here]
            before += max(here)
        return np.array(numbers)


def _is_mean(name: str) -> bool:
    return name.startswith(tuple(f"{split}_" for split in _SPLITS))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        values = np.array(value, float)
        return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


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
