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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from pspinal_jax.distributed import barrier, gather, is_primary
from pspinal_jax.distributed import count as process_count
from pspinal_jax.errors import RunError
from pspinal_jax.progress import progress_bar, say
from pspinal_jax.recipes.typed import typed
from pspinal_jax.training import stages
from pspinal_jax.training.costs import PROFILED_STEPS, Inspection, StepCosts, describe_costs, total_costs
from pspinal_jax.training.examples import EvaluatedSplit, Examples
from pspinal_jax.training.keys import make_order
from pspinal_jax.training.programs import Programs, SeedStates
from pspinal_jax.training.sharding import shardings
from pspinal_jax.training.signals import Stopped, StopRequest
from pspinal_jax.training.stages import LoopConfig, TrainingProgress, TrainingStage

if TYPE_CHECKING:
    from pspinal_jax.checkpoints import CheckpointStore  # imports Orbax

Callback = Callable[[int, Any, dict[str, Any]], object]
"""(finished epochs of the stage, the state of all seeds, metrics by name) -> whether to end the training there."""
REPORT = "nonfinite.json"
"""The file that describes a step that was not finite."""
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


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the loop works with.

    Attributes:
      config: what is trained, and for how long.
      programs: the compiled pieces.
      examples: all training examples, validation included; stages pick theirs by index.
      splits: 'test', and 'validation' where examples were held out.
      stages: what the run does one after the other.
      labels: int32 [N] of all training examples, by index, if an epoch draws evenly from all classes.
    """

    config: LoopConfig
    programs: Programs
    examples: Examples
    splits: Mapping[str, EvaluatedSplit]
    stages: list[TrainingStage]
    labels: np.ndarray | None


@dataclasses.dataclass(eq=False)
class Trainer:
    """One run, from its start or its newest checkpoint to its end.

    Attributes:
      setup: what the run works with.
      log: where its history goes.
      store: where its checkpoints go; None to keep none.
      stop: whether a signal has come.
      checkpoint_seconds: time between checkpoints.
      start: gives the variables that seeds start from in place of their initialisation, or some of them.
      callbacks: called after every chunk and every epoch.
      inspection: what to write down of the steps, for people.
      progress: how far the run has come.
      seed_states: the seeds' states.
    """

    setup: Setup
    log: Log
    store: "CheckpointStore | None"
    stop: StopRequest
    checkpoint_seconds: float
    start: Callable[[], dict[str, Any]] = dict
    callbacks: Sequence[Callback] = ()
    inspection: Inspection = dataclasses.field(default_factory=Inspection, init=False)
    progress: TrainingProgress = dataclasses.field(default_factory=TrainingProgress, init=False)
    seed_states: SeedStates = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.config, self.seed_states = self.setup.config, self._fresh_seed_states()
        self._asked_to_end, self._received = False, 0
        self._steps_per_second = self._compile_seconds = 0.0
        self._costs, self._lines = StepCosts({}), list[dict[str, Any]]()

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
        costs = describe_costs(total_costs(self._lines))
        if costs and is_primary() and self.config.shows_progress:
            say(f"costs: {'; '.join(f'{name} {value}' for name, value in costs.items())}")

    def _fresh_seed_states(self) -> SeedStates:
        config = self.setup.config
        return SeedStates(self.setup.programs, [config.seed + index for index in range(config.num_seeds)])

    def _restore(self) -> None:
        def abstract(progress: dict[str, Any]) -> dict[str, Any]:
            """Shapes and shardings on this run's mesh: each device reads its part of whatever was written."""
            typed("position", progress, TrainingProgress)
            shapes = jax.eval_shape(self.seed_states.trees)
            places = shardings(self.setup.programs.mesh, shapes, stacked=self.config.num_seeds > 1)
            return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)

        found = None if self.store is None else self.store.restore(abstract)
        if found is None:
            self.seed_states.start_from(self.start())
            self.log.rewind([])
            return
        trees, progress = found
        self.progress = TrainingProgress(**progress)
        self.seed_states.set_trees(trees, self.progress.steps_taken(self.stage))
        self.seed_states.set_totals(self.progress.totals or None)
        self.log.rewind(self.progress.finished(self.setup.stages))

    def _save(self) -> None:
        self.progress.totals = self.seed_states.totals() if self.progress.step else {}
        if self.store is not None:
            self.store.save(self.progress.serial, self.seed_states.trees(), dataclasses.asdict(self.progress))

    def _next_stage(self) -> None:
        old, finished = self.progress, self.seed_states
        kept = {name: getattr(old, name) for name in ("serial", "lines", "total_seconds")}
        self.progress = TrainingProgress(stage=old.stage + 1, **kept)
        self.seed_states = self._fresh_seed_states()
        if self.stage.name == "retrain":
            self.progress.selected_epoch = old.best_epoch
            self.progress.selected_accuracy = old.best_accuracy
            self.progress.selected_loss = old.best_loss
            self.seed_states.start_from(self.start())
        else:
            self.progress.epochs_before = old.epochs_before + old.epoch
            self.seed_states.continue_from_best(finished)

    def _run_stage(self) -> None:
        stage, progress, config = self.stage, self.progress, self.config
        if progress.stage_finished(config):
            return
        programs, count = self.setup.programs, self.setup.examples.count
        order = make_order(stage.subset, count, programs.vectorized, config.shuffle, self.setup.labels)
        self._plan_epoch(order)
        self._warm_up()
        total = None if stage.steps_per_epoch is None else progress.stage_epochs(config) * stage.steps_per_epoch
        shown, initial = is_primary() and config.shows_progress, progress.steps_in(stage)
        with progress_bar(total, stage.name, "step", shown, initial=initial, unit_scale=False) as bar:
            while True:
                self._run_epoch(bar)
                self._finish_epoch(bar)
                if progress.stage_finished(config) or self._asked_to_end:
                    return
                if self._synchronize() or progress.epoch == 1:
                    self._save()
                self._stop_if_received()
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
        """Compile what the stage calls."""
        start = time.perf_counter()
        self.setup.examples.warm_up(self.seed_states, self.stage)
        self.stop_if_asked()
        if self.stage.evaluates:
            self.setup.splits[self.stage.evaluates].warm_up(self.seed_states.evaluate)
        self.seed_states.update_best(np.zeros(self.config.num_seeds, bool))
        self.stop_if_asked()
        self._compile_seconds = time.perf_counter() - start
        self._costs = StepCosts(self.seed_states.step_flops(), self.setup.programs.mesh.size)
        self.inspection.dump(self.seed_states.calls, self.stage.name)

    def _run_epoch(self, bar: Any) -> None:
        stage, progress = self.stage, self.progress
        if progress.step == 0:
            self.seed_states.set_totals(None)
        chunks = self.setup.examples.chunks(self.seed_states, stage, progress.step, self._chunk_steps)
        with contextlib.closing(chunks):
            start = time.perf_counter()
            for chunk in chunks:
                with self.inspection.steps(progress.step):
                    steps = self.seed_states.run(chunk)
                    seconds = time.perf_counter() - start
                if progress.step < stage.whole_steps:
                    self._steps_per_second = steps / seconds
                progress.seconds += seconds
                progress.step += steps
                progress.serial += steps
                totals = self.seed_states.totals()
                self._check_finite(totals)
                self._show(bar, totals, steps)
                if stage.steps_per_epoch is None or progress.step < stage.steps_per_epoch:
                    if self.callbacks:
                        self._call_back(stages.training_means(totals))
                    if self._asked_to_end:
                        break
                    if self._synchronize():
                        self._save()
                    self._stop_if_received()
                start = time.perf_counter()

    def _check_finite(self, totals: dict[str, list[Any]]) -> None:
        """Raise RunError, naming the step, if one of the epoch so far was not finite; called before anything is saved.

        The report holds the seed, the epoch, the step, its learning rate and its examples. Training on from the last
        checkpoint comes by that step again.
        """
        bad_steps = np.asarray(totals["bad_step"])
        if not self.config.stop_on_nonfinite or (bad_steps < 0).all():
            return
        progress, states, size = self.progress, self.seed_states, self.config.batch_size
        index = int(np.argmax(bad_steps >= 0))
        bad = int(bad_steps[index])
        step = bad - (progress.steps_taken(self.stage) - progress.step)
        report = {
            "seed": states.seeds[index],
            "stage": self.stage.name,
            "epoch": progress.epoch + 1,
            "step_of_epoch": step + 1,
            "step_of_stage": bad + 1,
            "learning_rate": float(states.rates[index, step]),
            "examples": states.orders()[index, step * size : (step + 1) * size].tolist(),
        }
        path = self.log.report(report)
        if self.store is not None:
            self.store.finish()
        barrier()  # the first process to fail ends the others, and process 0 may still be writing
        kept = f"the last checkpoint before it is kept, and {path} names the examples in it; " if path else ""
        raise RunError(
            f"the loss, a running statistic or a gradient of seed {report['seed']} is not finite at step {step + 1} of "
            f"epoch {report['epoch']}; {kept}lower the learning rate, or leave such steps out with "
            "on_nonfinite=skip (in another workdir)"
        )

    def _chunk_steps(self, remaining: int) -> int:
        rate = self._steps_per_second
        if self.inspection.due:
            remaining = min(remaining, PROFILED_STEPS)
        return min(remaining, max(1, int(CHUNK_SECONDS * rate)) if rate else self.setup.examples.first_chunk)

    def _call_back(self, metrics: dict[str, Any]) -> None:
        for callback in self.callbacks:
            self._asked_to_end |= bool(callback(self.progress.epoch, self.seed_states.state, metrics))

    def _show(self, bar: Any, totals: dict[str, list[Any]], steps: int) -> None:
        shown = {"loss": f"{np.mean(stages.training_means(totals)['train_loss']):.4f}"}
        if self.progress.last_accuracy:
            shown[str(self.stage.evaluates)] = f"{np.mean(self.progress.last_accuracy):.4f}"
        bar.set_postfix(shown, refresh=False)
        bar.update(steps)

    def _finish_epoch(self, bar: Any) -> None:
        """Evaluate, select, and write the epoch's line."""
        stage, progress = self.stage, self.progress
        totals, start = self.seed_states.totals(), time.perf_counter()
        evaluation: dict[str, list[float]] = {}
        if stage.evaluates:
            split = self.setup.splits[stage.evaluates]
            sums = split.evaluate(self.seed_states.evaluate, self.stop_if_asked)
            predictions = sums.pop("predictions")
            evaluation = {stages.metric_name(name): (sums[name] / split.count).tolist() for name in sums}
            if self.config.selected_by == "balanced_accuracy":
                evaluation["balanced_accuracy"] = stages.balanced_accuracy(predictions, split.labels)
        progress.epoch += 1
        self._select(evaluation)
        line = stages.epoch_line(stage, progress, totals, evaluation, self._last_rates, self._compile_seconds)
        if any(totals["skipped"]):
            line["skipped_steps"] = stages.per_seed(totals["skipped"])
        if self.setup.examples.waited:
            line["input_seconds"] = round(self.setup.examples.waited, 4)
        line |= self._costs.fields(line["examples_per_second"] / (self.config.batch_size * self.config.num_seeds))
        self._lines.append(line)
        self.log.append(line)
        self._show(bar, totals, 0)
        self._call_back(line)
        progress.total_seconds += progress.seconds + time.perf_counter() - start
        progress.lines += 1
        progress.step, progress.seconds, self._compile_seconds = 0, 0.0, 0.0

    def _select(self, evaluation: dict[str, list[float]]) -> None:
        """Keep the parameters of the seeds that are better than before."""
        progress, config = self.progress, self.config
        count = config.num_seeds
        accuracy, loss = config.score(evaluation), evaluation.get("loss")
        if accuracy is not None and loss is not None:
            before = progress.best_accuracy or [-sys.float_info.max] * count
            before_loss = progress.best_loss or [None] * count
            progress.last_accuracy = accuracy
            by = [None] * count if config.keeps_first_of_ties else before_loss
            improved = stages.improves(accuracy, loss, before, by)
            improved &= ~np.asarray(progress.out_of_patience(config, progress.epoch - 1))
            self._restart_rates(improved)
            progress.best_accuracy = np.where(improved, accuracy, before).tolist()
            progress.best_loss = np.where(improved, np.asarray(loss, object), np.asarray(before_loss, object)).tolist()
        elif progress.selected_epoch:
            improved = np.asarray(progress.selected_epoch) == progress.epoch
        else:
            improved = np.full(count, progress.epoch == progress.stage_epochs(config))
        progress.best_epoch = np.where(improved, progress.epoch, progress.best_epoch or [0] * count).tolist()
        self.seed_states.update_best(improved)

    def _restart_rates(self, improved: np.ndarray) -> None:
        """The published VGG-5 scripts' way with the learning rate; see `OptimizerConfig.steering`."""
        progress = self.progress
        if self.config.restarts_rate:
            scales = progress.rate_scale or [1.0] * self.config.num_seeds
            seeds = [(seed, progress.stage, progress.epoch) for seed in self.seed_states.seeds]
            draws = [np.random.default_rng(seed).uniform() ** 3 for seed in seeds]
            progress.rate_scale = np.where(improved, scales, draws).tolist()

    def _synchronize(self) -> bool:
        """Look at the clock and for signals, all processes as one; whether a checkpoint is due.

        The clock is process 0's; a signal to any of them is a signal to all.
        """
        due = self.store is not None and self.store.due(self.checkpoint_seconds)
        seen = gather([self.stop.received or 0, due, self._steps_per_second])
        self._received = int(seen[:, 0].max())
        self._steps_per_second = float(seen[0, 2])
        return bool(seen[0, 1])

    def stop_if_asked(self) -> None:
        """Save and raise `Stopped` if a signal has come; called by all processes."""
        self._synchronize()
        self._stop_if_received()

    def _stop_if_received(self) -> None:
        if process_count() == 1:  # the signal may have come after the last look, during a save
            self._received = self.stop.received or 0
        if self._received:
            self._save()
            if self.store is not None:
                self.store.finish()
            raise Stopped(signal.Signals(self._received).name)
