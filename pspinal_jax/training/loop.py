"""The training loop: stages, epochs, chunks, evaluation, selection, checkpoints.

Batches come from `Setup.examples`: its `chunks` gives an epoch's steps, some seconds of them at a time, as numbers of
examples that lie on the devices or as batches that the host brings, the next one while the last one computes.

After each chunk the loop looks at signals and at the clock. After SIGINT or SIGTERM it saves a checkpoint and raises
`Stopped`; the next start goes on there, bit for bit.

A loss, gradient or running statistic that is not finite raises RunError before anything is saved, and what is needed to
see that step again is written down; with `on_nonfinite="skip"` the step itself leaves the state as it was.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from pspinal_jax.distributed import barrier, gather, is_primary
from pspinal_jax.errors import RunError
from pspinal_jax.progress import progress_bar
from pspinal_jax.recipes.typed import typed
from pspinal_jax.training.examples import EvaluatedSplit, Examples
from pspinal_jax.training.programs import Programs, SeedStates, make_order
from pspinal_jax.training.sharding import shardings
from pspinal_jax.training.signals import Stopped, StopRequest
from pspinal_jax.training.stages import (
    LoopConfig,
    TrainingProgress,
    TrainingStage,
    balanced_accuracy,
    epoch_line,
    improves,
    metric_name,
    per_seed,
    training_means,
)

Callback = Callable[[int, Any, dict[str, Any]], object]
"""(finished epochs of the stage, the state of all seeds, metrics by name) -> whether to end the training there."""
REPORT = "nonfinite.json"
"""The file that tells of a step that was not finite."""
CHUNK_SECONDS = 2.0
"""Longest time between two looks at the clock and at signals."""


class Log(Protocol):
    """Where the history goes."""

    def rewind(self, finished: Sequence[tuple[str, int]]) -> None:
        """Keep the lines of these (stage, epoch) only."""

    def append(self, line: dict[str, Any]) -> None:
        """Add an epoch's line."""

    def report(self, found: dict[str, Any]) -> Path | None:
        """Write down what is known of a step that was not finite; where that lies."""


class Store(Protocol):
    """Where checkpoints go; see `pspinal_jax.checkpoints.CheckpointStore`."""

    def due(self, seconds: float) -> bool:
        """Whether it is time for a checkpoint."""

    def save(self, step: int, trees: dict[str, Any], progress: dict[str, Any]) -> None:
        """Save a checkpoint."""

    def finish(self) -> None:
        """Return when the last one is saved."""

    def restore(self, abstract: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest one, (trees, progress); None where there is none."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the loop works with.

    Attributes:
      config: what is trained, and for how long.
      programs: the compiled pieces.
      examples: all training examples, validation included; stages pick theirs by index.
      splits: 'test', and 'validation' where examples were held out.
      stages: what the run does one after the other.
      labels: int32 [N] of all training examples, by index.
      validation_labels: int32 [V] of the split 'validation', empty where there is none.
    """

    config: LoopConfig
    programs: Programs
    examples: Examples
    splits: Mapping[str, EvaluatedSplit]
    stages: list[TrainingStage]
    labels: np.ndarray
    validation_labels: np.ndarray


class Trainer:
    """One run, from its start or its newest checkpoint to its end.

    Attributes:
      setup: what the run works with.
      seed_states: the seeds' states.
      progress: how far the run has come.
    """

    def __init__(
        self,
        setup: Setup,
        log: Log,
        store: Store,
        stop: StopRequest,
        checkpoint_seconds: float,
        start: Callable[[], dict[str, Any]] = dict,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.setup = setup
        self.config = setup.config
        self.progress = TrainingProgress()
        self._log = log
        self._store = store
        self._stop = stop
        self._checkpoint_seconds = checkpoint_seconds
        self._start = start
        self._callbacks = callbacks
        self._asked_to_end = False
        self._steps_per_second = 0.0
        self._compile_seconds = 0.0
        self._received = 0
        self.seed_states = self._fresh_seed_states()

    @property
    def stage(self) -> TrainingStage:
        """The stage under way."""
        return self.setup.stages[self.progress.stage]

    def run(self) -> None:
        """Train to the end, from the newest whole checkpoint if there is one.

        Raises:
          Stopped: after SIGINT or SIGTERM, once the run is saved.
          RunError: if a loss stops being finite, or a checkpoint cannot be written or read.
        """
        self._restore()
        self.stop_if_asked()
        self._run_stage()
        while self.progress.stage + 1 < len(self.setup.stages):
            self._next_stage()
            self._run_stage()
        self._save()

    def _fresh_seed_states(self) -> SeedStates:
        config = self.config
        return SeedStates(self.setup.programs, [config.seed + index for index in range(config.num_seeds)])

    def _restore(self) -> None:
        def abstract(progress: dict[str, Any]) -> dict[str, Any]:
            """Shapes and shardings on this run's mesh: each device reads its part of whatever was written."""
            typed("position", progress, TrainingProgress)
            shapes = jax.eval_shape(self.seed_states.trees)
            places = shardings(self.setup.programs.mesh, shapes, stacked=self.config.num_seeds > 1)
            return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)

        found = self._store.restore(abstract)
        if found is None:
            self.seed_states.start_from(self._start())
            self._log.rewind([])
            return
        trees, progress = found
        self.progress = TrainingProgress(**progress)
        self.seed_states.set_trees(trees, self.progress.steps_taken(self.stage))
        self.seed_states.set_totals(self.progress.totals or None)
        self._log.rewind(self.progress.finished(self.setup.stages))

    def _save(self) -> None:
        self.progress.totals = self.seed_states.totals() if self.progress.step else {}
        self._store.save(self.progress.serial, self.seed_states.trees(), dataclasses.asdict(self.progress))

    def _next_stage(self) -> None:
        progress = self.progress
        self.progress = TrainingProgress(
            stage=progress.stage + 1,
            serial=progress.serial,
            lines=progress.lines,
            total_seconds=progress.total_seconds,
        )
        if self.stage.name == "retrain":
            self.progress.selected_epoch = progress.best_epoch
            self.progress.selected_accuracy = progress.best_accuracy
            self.progress.selected_loss = progress.best_loss
            self.seed_states = self._fresh_seed_states()
            self.seed_states.start_from(self._start())
        else:
            self.progress.epochs_before = progress.epochs_before + progress.epoch
            best, self.seed_states = self.seed_states, self._fresh_seed_states()
            self.seed_states.continue_from_best(best)

    def _run_stage(self) -> None:
        stage, progress, config = self.stage, self.progress, self.config
        epochs = progress.stage_epochs(config)
        if progress.stage_finished(config):
            return
        order = make_order(
            stage.subset,
            self.setup.examples.count,
            self.setup.programs.vectorized,
            config.shuffle,
            self.setup.labels if config.balanced else None,
        )
        self._plan_epoch(order)
        self._warm_up()
        total = None if stage.steps_per_epoch is None else epochs * stage.steps_per_epoch
        shown, initial = is_primary() and config.shows_progress, progress.steps_in(stage)
        with progress_bar(total, stage.name, "step", shown, initial=initial, unit_scale=False) as bar:
            while True:
                self._run_epoch(bar)
                self._finish_epoch(epochs, bar)
                if progress.stage_finished(config) or self._asked_to_end:
                    return
                if self._synchronize() or progress.epoch == 1:
                    self._save()
                self.stop_if_asked()
                self._plan_epoch(order)

    def _plan_epoch(self, order: Callable[..., jax.Array]) -> None:
        stage, config, epoch = self.stage, self.config, self.progress.epoch
        steps = stage.steps_per_epoch or 1
        rates = config.learning_rates(epoch, steps) if config.learning_rates else np.ones(steps, np.float32)
        scale = np.asarray(self.progress.rate_scale or [1.0] * config.num_seeds, np.float32)
        self._last_rates = (scale * rates[-1]).tolist() if config.learning_rates else None
        # A power of two, so that stages and runs alike call the same program.
        longest = max(stage.steps_per_epoch or 1 for stage in self.setup.stages)
        padded = np.pad(rates, (0, (1 << (longest - 1).bit_length()) - steps))
        self.seed_states.plan_epoch(order, self.progress.epochs_before + epoch, scale[:, None] * padded)

    def _warm_up(self) -> None:
        start = time.perf_counter()
        self.setup.examples.warm_up(self.seed_states, self.stage)
        self.stop_if_asked()
        if self.stage.evaluates:
            self.setup.splits[self.stage.evaluates].warm_up(self.seed_states.evaluate)
        self.seed_states.warm_up()
        self.stop_if_asked()
        self._compile_seconds = time.perf_counter() - start

    def _run_epoch(self, bar: Any) -> None:
        stage, progress = self.stage, self.progress
        if progress.step == 0:
            self.seed_states.set_totals(None)
        chunks = self.setup.examples.chunks(self.seed_states, stage, progress.step, self._chunk_steps)
        with contextlib.closing(chunks):
            start = time.perf_counter()
            for chunk in chunks:
                steps = self.seed_states.run(chunk)
                seconds = time.perf_counter() - start
                if progress.step < stage.whole_steps:
                    self._steps_per_second = steps / seconds
                progress.seconds += seconds
                progress.step += steps
                progress.serial += steps
                self._check_finite()
                bar.set_postfix(self._shown(), refresh=False)
                bar.update(steps)
                if stage.steps_per_epoch is None or progress.step < stage.steps_per_epoch:
                    if self._callbacks:
                        self._call_back(self._running())
                    if self._asked_to_end:
                        break
                    if self._synchronize():
                        self._save()
                    self.stop_if_asked()
                start = time.perf_counter()

    def _check_finite(self) -> None:
        """Raise RunError, naming the step, if one of the epoch so far was not finite; called before anything is saved.

        What the log keeps of it tells the seed, the epoch, the step, its learning rate and its examples. Training on
        from the last checkpoint comes by that step again.
        """
        bad_steps = self.seed_states.totals()["bad_step"] if self.config.stop_on_nonfinite else []
        for index, bad in enumerate(bad_steps):
            if bad < 0:
                continue
            progress = self.progress
            step = bad - (progress.steps_taken(self.stage) - progress.step)
            report = {
                "seed": self.seed_states.seeds[index],
                "stage": self.stage.name,
                "epoch": progress.epoch + 1,
                "step_of_epoch": step + 1,
                "step_of_stage": bad + 1,
                "learning_rate": self.seed_states.learning_rate(index, step),
                "examples": self.seed_states.examples(index, step, self.config.batch_size).tolist(),
            }
            path = self._log.report(report)
            kept = (
                f"the last checkpoint before it is kept, and {path} tells which examples it saw: look for numbers in "
                "them that are out of all range, "
            )
            self._store.finish()
            barrier()  # the first process to fail ends the others, and process 0 may still be writing
            raise RunError(
                f"the loss, a running statistic or a gradient of seed {report['seed']} is not finite at step "
                f"{step + 1} of epoch {report['epoch']}; {kept if path else ''}{self.config.advice}"
            )

    def _chunk_steps(self, remaining: int) -> int:
        rate = self._steps_per_second
        return min(remaining, max(1, int(CHUNK_SECONDS * rate)) if rate else self.setup.examples.first_chunk)

    def _running(self) -> dict[str, Any]:
        """Means over the epoch's examples so far."""
        return training_means(self.seed_states.totals())

    def _call_back(self, metrics: dict[str, Any]) -> None:
        for callback in self._callbacks:
            self._asked_to_end |= bool(callback(self.progress.epoch, self.seed_states.state, metrics))

    def _shown(self) -> dict[str, str]:
        shown = {"loss": f"{np.mean(self._running()['train_loss']):.4f}"}
        if self.progress.last_accuracy:
            shown[str(self.stage.evaluates)] = f"{np.mean(self.progress.last_accuracy):.4f}"
        return shown

    def _finish_epoch(self, epochs: int, bar: Any) -> None:
        """Evaluate, select, and write the epoch's line."""
        stage, progress = self.stage, self.progress
        totals = self.seed_states.totals()
        start = time.perf_counter()
        evaluation: dict[str, list[float]] = {}
        if stage.evaluates:
            split = self.setup.splits[stage.evaluates]
            sums = split.evaluate(self.seed_states.evaluate, self.stop_if_asked)
            predictions = sums.pop("predictions")
            evaluation = {metric_name(name): (sums[name] / split.count).tolist() for name in sums}
            if self.config.selected_by == "balanced_accuracy":
                evaluation["balanced_accuracy"] = balanced_accuracy(predictions, self.setup.validation_labels)
        progress.epoch += 1
        self._select(evaluation, epochs)
        line = epoch_line(
            stage, progress, totals, evaluation, learning_rates=self._last_rates, compile_seconds=self._compile_seconds
        )
        if any(totals["skipped"]):
            line["skipped_steps"] = per_seed(totals["skipped"])
        if self.setup.examples.waited:
            line["input_seconds"] = round(self.setup.examples.waited, 4)
        self._log.append(line)
        bar.set_postfix(self._shown(), refresh=False)
        bar.update(0)
        self._call_back(line)
        progress.total_seconds += progress.seconds + time.perf_counter() - start
        progress.lines += 1
        progress.step, progress.seconds, self._compile_seconds = 0, 0.0, 0.0

    def _select(self, evaluation: dict[str, list[float]], epochs: int) -> None:
        progress, config = self.progress, self.config
        count = config.num_seeds
        accuracy, loss = config.score(evaluation), evaluation.get("loss")
        before = progress.best_accuracy or [config.least_score] * count
        before_loss = progress.best_loss or [None] * count
        best_epoch = np.asarray(progress.best_epoch or [0] * count)
        if accuracy is not None and loss is not None:
            progress.last_accuracy = accuracy
            over = progress.out_of_patience(config, progress.epoch - 1)
            by = [None] * count if config.keeps_first_of_ties else before_loss
            improved = improves(accuracy, loss, before, by) & ~np.asarray(over)
            self._steer(improved)
            progress.best_accuracy = np.where(improved, accuracy, before).tolist()
            progress.best_loss = [
                now if better else was for better, now, was in zip(improved, loss, before_loss, strict=True)
            ]
        elif progress.selected_epoch:
            improved = np.asarray(progress.selected_epoch) == progress.epoch
        else:
            improved = np.full(count, progress.epoch == epochs)
        progress.best_epoch = np.where(improved, progress.epoch, best_epoch).tolist()
        self.seed_states.update_best(improved)

    def _steer(self, improved: np.ndarray) -> None:
        """The published VGG-5 scripts' way with the learning rate; see `OptimizerConfig.steering`."""
        progress = self.progress
        if not self.config.restarts_rate:
            return
        scales = progress.rate_scale or [1.0] * self.config.num_seeds
        draws = [
            np.random.default_rng((seed, progress.stage, progress.epoch)).uniform() ** 3
            for seed in self.seed_states.seeds
        ]
        progress.rate_scale = np.where(improved, scales, draws).tolist()

    def _synchronize(self) -> bool:
        """Look at the clock and for signals, all processes as one; whether a checkpoint is due.

        The clock is process 0's; a signal to any of them is a signal to all.
        """
        seen = gather([self._stop.received or 0, self._store.due(self._checkpoint_seconds), self._steps_per_second])
        self._received = int(seen[:, 0].max())
        self._steps_per_second = float(seen[0, 2])
        return bool(seen[0, 1])

    def stop_if_asked(self) -> None:
        """Save and raise `Stopped` if a signal has come; called by all processes."""
        self._synchronize()
        if self._received:
            self._save()
            self._store.finish()
            raise Stopped(signal.Signals(self._received).name)
