"""The training loop: stages, epochs, chunks, evaluation, selection, checkpoints.

A loss, gradient or running statistic that is not finite stops it, and what is needed to see that step again is written
down.
"""

import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pspinal_jax.checkpoints import CheckpointStore
from pspinal_jax.distributed.coordination import barrier, gather, is_primary
from pspinal_jax.errors import RunError
from pspinal_jax.progress import StepProgress
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.recipes.typed import typed
from pspinal_jax.runs.build import Setup, abstract_trees, longest_epoch, padded_rates
from pspinal_jax.runs.directory import RunDirectory, write_json
from pspinal_jax.runs.metrics import MetricsWriter, balanced_accuracy, epoch_line, per_seed
from pspinal_jax.runs.programs import schedule_of
from pspinal_jax.runs.progress import TrainingProgress, TrainingStage, improves, selected_by
from pspinal_jax.runs.seed_states import SeedStates
from pspinal_jax.runs.signals import Stopped, StopRequest
from pspinal_jax.training.optimizers import learning_rates
from pspinal_jax.training.programs import make_order

REPORT = "nonfinite.json"
CHUNK_SECONDS = 2.0
"""Longest time between two looks at the clock and at signals."""


class Trainer:
    """One run, from its start or its newest checkpoint to its end.

    Attributes:
      setup: what the run works with.
      seed_states: the seeds' states.
      progress: how far the run has come.
      directory: where the run's files are.
      longest: the epochs to retrain for, from the most that a seed of this run selected.
    """

    def __init__(
        self,
        setup: Setup,
        metrics: MetricsWriter,
        store: CheckpointStore,
        stop: StopRequest,
        checkpoint_seconds: float,
        start: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.setup = setup
        self.progress = TrainingProgress()
        self.directory = metrics.directory
        self.longest: Callable[[int], int] | None = None
        self._metrics = metrics
        self._store = store
        self._stop = stop
        self._checkpoint_seconds = checkpoint_seconds
        self._start = start
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
        recipe = self.setup.recipe
        return SeedStates(self.setup.programs, [recipe.seed + index for index in range(recipe.num_seeds)])

    def _restore(self) -> None:
        def wanted(progress: dict[str, Any]) -> dict[str, Any]:
            typed("position", progress, TrainingProgress)
            return abstract_trees(jax.eval_shape(self.seed_states.trees), self.setup.recipe, self.setup.programs)

        found = self._store.restore(wanted)
        if found is None:
            self.seed_states.start_from(self._start())
            self._metrics.rewind([])
            return
        trees, progress = found
        self.progress = TrainingProgress(**progress)
        self.seed_states.set_trees(trees, self.progress.steps_taken(self.stage))
        self.seed_states.set_totals(self.progress.totals or None)
        self._metrics.rewind(self.progress.finished(self.setup.recipe, self.setup.stages))

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
            if self.longest is not None:
                self.progress.longest = self.longest(max(progress.best_epoch))
            self.seed_states = self._fresh_seed_states()
            self.seed_states.start_from(self._start())
        else:
            self.progress.epochs_before = progress.epochs_before + progress.epoch
            best, self.seed_states = self.seed_states, self._fresh_seed_states()
            self.seed_states.continue_from_best(best)

    def _run_stage(self) -> None:
        stage, progress, recipe = self.stage, self.progress, self.setup.recipe
        epochs = progress.stage_epochs(recipe)
        if progress.stage_finished(recipe):
            return
        order = make_order(
            stage.subset,
            self.setup.examples.count,
            self.setup.programs.vectorized,
            recipe.data.shuffle,
            self.setup.labels if recipe.sampler == "balanced" else None,
        )
        self._plan_epoch(order)
        self._warm_up()
        done = progress.epoch * stage.steps_per_epoch + progress.step
        with StepProgress(epochs * stage.steps_per_epoch, done, stage.name, is_primary()) as bar:
            while True:
                self._run_epoch(bar)
                self._finish_epoch(epochs, bar)
                if progress.stage_finished(recipe):
                    return
                if self._synchronize() or progress.epoch == 1:
                    self._save()
                self.stop_if_asked()
                self._plan_epoch(order)

    def _plan_epoch(self, order: Callable[..., jax.Array]) -> None:
        stage, recipe, epoch = self.stage, self.setup.recipe, self.progress.epoch
        rates = learning_rates(schedule_of(recipe), epoch, stage.steps_per_epoch, recipe.epochs)
        scale = np.asarray(self.progress.rate_scale or [1.0] * recipe.num_seeds, np.float32)
        self._last_rates = (scale * rates[-1]).tolist()
        padded = padded_rates(rates, longest_epoch(self.setup.stages))
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

    def _run_epoch(self, bar: StepProgress) -> None:
        stage, progress = self.stage, self.progress
        if progress.step == 0:
            self.seed_states.set_totals(None)
        with self.setup.examples.epoch(self.seed_states, stage, progress.step) as advance:
            while progress.step < stage.steps_per_epoch:
                start = time.perf_counter()
                # The tail, a smaller batch, is a chunk of its own.
                steps = self._chunk_steps(stage.whole_steps - progress.step) or 1
                advance(progress.step, steps)
                seconds = time.perf_counter() - start
                if progress.step < stage.whole_steps:
                    self._steps_per_second = steps / seconds
                progress.seconds += seconds
                progress.step += steps
                progress.serial += steps
                self._check_finite()
                bar.advance(steps, **self._shown())
                if progress.step < stage.steps_per_epoch:
                    if self._synchronize():
                        self._save()
                    self.stop_if_asked()

    def _check_finite(self) -> None:
        recipe = self.setup.recipe
        if recipe.on_nonfinite == "stop":
            try:
                check_finite(
                    recipe, self.seed_states, self.seed_states.totals(), self.stage, self.progress, self.directory
                )
            except RunError:
                self._store.finish()
                barrier()  # the first process to fail ends the others, and process 0 may still be writing
                raise

    def _chunk_steps(self, remaining: int) -> int:
        rate = self._steps_per_second
        return min(remaining, max(1, int(CHUNK_SECONDS * rate)) if rate else self.setup.examples.first_chunk)

    def _shown(self) -> dict[str, str]:
        totals = self.seed_states.totals()
        losses = np.divide(totals["loss"], np.maximum(totals["count"], 1))
        shown = {"loss": f"{losses.mean():.4f}"}
        if self.progress.last_accuracy:
            shown[str(self.stage.evaluates)] = f"{np.mean(self.progress.last_accuracy):.4f}"
        return shown

    def _finish_epoch(self, epochs: int, bar: StepProgress) -> None:
        """Evaluate, select, and write the epoch's line."""
        stage, progress, recipe = self.stage, self.progress, self.setup.recipe
        totals = self.seed_states.totals()
        start = time.perf_counter()
        evaluation: dict[str, list[float]] = {}
        if stage.evaluates:
            split = self.setup.splits[stage.evaluates]
            sums = split.evaluate(self.seed_states.evaluate, self.stop_if_asked)
            evaluation = {"accuracy": (sums["correct"] / split.count).tolist()}
            evaluation["loss"] = (sums["loss"] / split.count).tolist()
            if selected_by(recipe) == "balanced_accuracy":
                evaluation["balanced_accuracy"] = balanced_accuracy(sums["predictions"], self.setup.validation_labels)
        progress.epoch += 1
        self._select(evaluation.get(selected_by(recipe)), evaluation.get("loss"), epochs)
        line = epoch_line(
            stage, progress, totals, evaluation, learning_rates=self._last_rates, compile_seconds=self._compile_seconds
        )
        if any(totals["skipped"]):
            line["skipped_steps"] = per_seed(totals["skipped"])
        if self.setup.examples.waited:
            line["input_seconds"] = round(self.setup.examples.waited, 4)
        self._metrics.append(line)
        bar.advance(0, **self._shown())
        progress.total_seconds += progress.seconds + time.perf_counter() - start
        progress.lines += 1
        progress.step, progress.seconds, self._compile_seconds = 0, 0.0, 0.0

    def _select(self, accuracy: list[float] | None, loss: list[float] | None, epochs: int) -> None:
        progress, recipe = self.progress, self.setup.recipe
        count = recipe.num_seeds
        before, before_loss = progress.best_accuracy or [-1.0] * count, progress.best_loss or [None] * count
        best_epoch = np.asarray(progress.best_epoch or [0] * count)
        if accuracy is not None and loss is not None:
            progress.last_accuracy = accuracy
            over = progress.out_of_patience(recipe, progress.epoch - 1)
            # The published scripts keep the first of tied epochs.
            by = [None] * count if recipe.protocol == "paper" else before_loss
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
        recipe, progress = self.setup.recipe, self.progress
        if recipe.optimizer.steering == "none":
            return
        scales = progress.rate_scale or [1.0] * recipe.num_seeds
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


def check_finite(
    recipe: Recipe,
    seed_states: SeedStates,
    totals: dict[str, list[Any]],
    stage: TrainingStage,
    progress: TrainingProgress,
    directory: RunDirectory,
) -> None:
    """Raise RunError, naming the step, if one of the epoch so far was not finite; called before anything is saved.

    nonfinite.json in the run's directory tells the seed, the epoch, the step, its learning rate and its examples. The
    run is a function of its recipe, so training on from the last checkpoint comes by that step again.
    """
    for index, bad in enumerate(totals["bad_step"]):
        if bad < 0:
            continue
        step = bad - (progress.epochs_before + progress.epoch) * stage.steps_per_epoch
        report = {
            "seed": seed_states.seeds[index],
            "stage": stage.name,
            "epoch": progress.epoch + 1,
            "step_of_epoch": step + 1,
            "step_of_stage": bad + 1,
            "learning_rate": seed_states.learning_rate(index, step),
            "examples": seed_states.examples(index, step, recipe.batch_size).tolist(),
        }
        if is_primary():
            write_json(directory.path / REPORT, report)
        raise RunError(
            f"the loss, a running statistic or a gradient of seed {report['seed']} is not finite at step {step + 1} of "
            f"epoch {report['epoch']}; the last checkpoint before it is kept, and {directory.path / REPORT} tells "
            "which examples it saw: look for numbers in them that are out of all range, lower "
            "--optimizer.learning-rate, or leave such steps out with --on-nonfinite skip (in another --workdir)"
        )
