"""What a run does one after the other, how far it has come, and what an epoch reports."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class TrainingStage:
    """One training, from scratch or, in the paper's chain of rounds, from the best of the one before.

    Attributes:
      name: 'train', 'retrain' for the second one on train + validation, or 'round_1' .. of the paper's chain.
      subset: indices of the training examples that it uses.
      evaluates: 'validation', 'test' (the paper's protocol) or None: what is evaluated after every epoch.
      steps_per_epoch: steps of whole batches, and one for the tail if it is kept; None where only the end shows it.
      whole_steps: steps of whole batches.
      tail_size: examples in the tail, 0 for none.
    """

    name: str
    subset: np.ndarray
    evaluates: str | None
    steps_per_epoch: int | None
    whole_steps: int
    tail_size: int


def make_stage(
    name: str, subset: np.ndarray, evaluates: str | None, batch_size: int, drop_remainder: bool
) -> TrainingStage:
    """A stage on these examples, in batches of so many; see `TrainingStage`."""
    whole, tail = divmod(len(subset), batch_size)
    tail = 0 if drop_remainder else tail
    return TrainingStage(name, subset, evaluates, whole + (tail > 0), whole, tail)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What the loop has to know beside its data and its compiled steps.

    Attributes:
      seed: the first seed.
      num_seeds: K; the seeds are seed .. seed + K - 1.
      epochs: passes of every stage but one that trains again.
      batch_size: examples per step.
      learning_rates: (epoch from 0, steps) -> float32 [steps]; None where the optimiser has its own.
      shuffle: whether every epoch has an order of its own.
      selected_by: what the best epoch is the best in: accuracy, balanced_accuracy, the name of a metric, or loss; None
        to keep the last epoch.
      patience: epochs without a better one after which a seed stops; 0 for no limit.
      restarts_rate: whether an epoch that is no better draws the learning rate anew, see `OptimizerConfig.steering`.
      stop_on_nonfinite: whether a loss or gradient that is not finite ends the run.
      keeps_first_of_ties: whether of epochs that are equally good the first is kept, as by the published scripts.
      shows_progress: whether a bar on standard error shows it.
    """

    seed: int
    num_seeds: int
    epochs: int
    batch_size: int
    learning_rates: Callable[[int, int], np.ndarray] | None = None
    shuffle: bool = True
    selected_by: str | None = "accuracy"
    patience: int = 0
    restarts_rate: bool = False
    stop_on_nonfinite: bool = True
    keeps_first_of_ties: bool = False
    shows_progress: bool = True

    def score(self, evaluation: dict[str, list[float]]) -> list[float] | None:
        """What the epoch is selected by, the larger the better; None where it is not."""
        values = evaluation.get(self.selected_by or "")
        return [-value for value in values] if values is not None and self.selected_by == "loss" else values


def improves(accuracy: Any, loss: Any, best_accuracy: Any, best_loss: Any) -> np.ndarray:
    """Whether an epoch is selected before the best one so far, elementwise.

    The higher accuracy decides, of equal ones the lower loss, and of equal losses the later epoch. A `best_loss` of
    None (of a checkpoint from before it was kept) is beaten by accuracy alone, NaN by any other.
    """
    loss, best_loss = (
        np.nan_to_num([-np.inf if each is None else each for each in losses], nan=np.inf, posinf=np.inf, neginf=-np.inf)
        for losses in (loss, best_loss)
    )
    tied = np.asarray(accuracy) == np.asarray(best_accuracy)
    return np.asarray((np.asarray(accuracy) > np.asarray(best_accuracy)) | (tied & (loss <= best_loss)))


@dataclasses.dataclass
class TrainingProgress:
    """How far a run has come; stored with every checkpoint. Lists have an entry per seed.

    Attributes:
      stage: index of the stage under way.
      epoch: finished epochs of that stage.
      step: finished steps of the epoch under way.
      serial: steps taken in all stages together; numbers the checkpoints.
      lines: lines of metrics.jsonl written.
      seconds: seconds spent on the epoch under way.
      total_seconds: seconds spent on all finished epochs and evaluations.
      totals: the epoch's sums so far: loss, correct, count.
      best_epoch: the epoch whose parameters are kept, 0 for none yet.
      best_accuracy: its accuracy on what the stage evaluates, or balanced accuracy (see `LoopConfig`), 0 .. 1.
      best_loss: its loss there, None in a checkpoint from before it was kept.
      last_accuracy: that of the newest epoch.
      epochs_before: epochs of earlier rounds of the paper's chain: orders and random numbers go on counting.
      rate_scale: what the learning rate is multiplied with, where it is drawn anew.
      selected_epoch: the first stage's selection, [] while it lasts.
      selected_accuracy: its validation accuracy.
      selected_loss: its validation loss, [] in a checkpoint from before it was kept.
      longest: not used any more; earlier versions recorded it.
      processes: how many have trained these seeds side by side.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    serial: int = 0
    lines: int = 0
    epochs_before: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    totals: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    best_epoch: list[int] = dataclasses.field(default_factory=list)
    best_accuracy: list[float] = dataclasses.field(default_factory=list)
    best_loss: list[float | None] = dataclasses.field(default_factory=list)
    last_accuracy: list[float] = dataclasses.field(default_factory=list)
    rate_scale: list[float] = dataclasses.field(default_factory=list)
    selected_epoch: list[int] = dataclasses.field(default_factory=list)
    selected_accuracy: list[float] = dataclasses.field(default_factory=list)
    selected_loss: list[float | None] = dataclasses.field(default_factory=list)
    longest: int = 0
    processes: int = 1

    def steps_taken(self, stage: TrainingStage) -> int:
        """Steps since the parameters were initialised, rounds before included."""
        if self.stage == 0 or self.epochs_before:
            return self.serial
        assert stage.steps_per_epoch is not None
        return self.epoch * stage.steps_per_epoch + self.step

    def steps_in(self, stage: TrainingStage) -> int:
        """Steps of the stage under way."""
        return self.serial if stage.steps_per_epoch is None else self.epoch * stage.steps_per_epoch + self.step

    def finished(self, stages: list[TrainingStage]) -> list[tuple[str, int]]:
        """(stage, epoch) of every finished epoch, in order."""
        # Early stopping may end a stage before recipe.epochs.
        before = (self.lines - self.epoch) // self.stage if self.stage else 0
        counts = [before] * self.stage + [self.epoch]
        return [(stage.name, epoch + 1) for stage, count in zip(stages, counts, strict=False) for epoch in range(count)]

    def out_of_patience(self, config: LoopConfig, epochs: int) -> list[bool]:
        """Of every seed, whether `epochs` epochs of the stage leave its best one too far behind; see `LoopConfig`.

        From then on it selects nothing more, so that its result does not depend on the seeds that it runs with.
        """
        if not config.patience or self.selected_epoch:
            return [False] * config.num_seeds
        best = self.best_epoch or [0] * config.num_seeds
        return [epochs - epoch >= config.patience for epoch in best]

    def stage_finished(self, config: LoopConfig) -> bool:
        """Whether the stage under way has no epoch left."""
        return self.epoch >= self.stage_epochs(config) or all(self.out_of_patience(config, self.epoch))

    def stage_epochs(self, config: LoopConfig) -> int:
        """Epochs of the stage under way: as many as the configuration says or, to retrain, as any seed selected."""
        return max(self.selected_epoch, default=config.epochs)


def epoch_line(
    stage: TrainingStage,
    progress: TrainingProgress,
    totals: dict[str, list[Any]],
    evaluation: dict[str, list[float]],
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
