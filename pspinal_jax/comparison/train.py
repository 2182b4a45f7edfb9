"""Trainings of a head by one compiled program: one after the other on every core of a CPU, or many as one on devices.

A training is a pure function of arrays, so that all trials and seeds of a head share one program. It returns
predictions: labels of evaluated examples never enter it, and trials see zeros in place of the test examples.

On CPU a vectorised head gains nothing, but cores do: a thread for each calls the same single-threaded executable (as
fast as a process for each, measured, and compiled once). Elsewhere the program is mapped over an axis of slots, which
is cut over the devices of the mesh; the devices exchange nothing.
"""

import bisect
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from pspinal_jax.comparison.settings import HeadName, Hparams, Match, Mode, Trial
from pspinal_jax.environment import enable_compilation_cache, jax_settings
from pspinal_jax.heads import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.heads.baselines import matching_width
from pspinal_jax.heads.layouts import training_layout
from pspinal_jax.models import Classifier, abstract_variables, count_parameters
from pspinal_jax.ray import cluster, run_tasks
from pspinal_jax.training import keys, optimizers
from pspinal_jax.training.sharding import make_mesh, replicated_on
from pspinal_jax.training.state import EpochMetrics, Layouts, convert_state, head_layouts
from pspinal_jax.training.step import EpochPlan, TrainStep, run_chunk, target_losses


def build_head(
    name: HeadName, num_features: int, num_classes: int, layer_width: int, num_layers: int, match: Match
) -> tuple[nn.Module, int]:
    """A head and its number of trainable parameters.

    Args:
      name: which.
      num_features: D.
      num_classes: C.
      layer_width: width of each hidden layer of `progressive`, and as published of `spinal`.
      num_layers: how many hidden layers these two have.
      match: 'published': `spinal` has `layer_width` too. 'parameters': it has the width at which it comes closest to
        the parameters of `progressive`. `mlp` always has; `dense` has no width to choose.
    """

    def size(head: nn.Module) -> int:
        return count_parameters(abstract_variables(head, (num_features,))["params"])

    def spinal_size(width: int) -> int:
        return size(SpinalHead(num_classes, width, num_layers))

    head: nn.Module = ProgressiveSpinalHead(num_classes, layer_width, num_layers)
    goal = size(head)
    if name == "dense":
        head = DenseHead(num_classes)
    elif name == "mlp":
        head = MLPHead(num_classes, matching_width(goal, num_features, num_classes, batch_norm=False))
    elif name == "spinal":
        if match == "parameters":
            above = bisect.bisect_left(range(2**20), goal, lo=2, key=spinal_size)
            layer_width = min((above - 1, above), key=lambda width: abs(spinal_size(width) - goal))
        head = SpinalHead(num_classes, layer_width, num_layers)
    return head, size(head)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What is compiled in, beside the head.

    Attributes:
      epochs: passes over the training part.
      steps: of an epoch.
      batch_size: examples a step; the last, smaller batch of an epoch is left out (other examples each epoch).
      eval_batch_size: examples predicted at a time.
    """

    epochs: int
    steps: int
    batch_size: int
    eval_batch_size: int

    def rates(self) -> np.ndarray:
        """The learning rates of a one-cycle schedule with a peak of 1 as float32 [epochs, steps]."""
        rates = partial(optimizers.learning_rates, optimizers.Schedule("one_cycle", 1.0))
        with jax.ensure_compile_time_eval():
            return np.stack([rates(epoch, self.steps, self.epochs) for epoch in range(self.epochs)])


class Part(NamedTuple):
    """Which examples a training sees, and how.

    Attributes:
      train: int32 [N], rows of the examples that are trained on.
      evaluated: int32 [E], rows of those to predict, padded to a multiple of `eval_batch_size`.
      shift: float32 [D], subtracted from every example ..
      scale: .. and what it is multiplied with after that.
    """

    train: Any
    evaluated: Any
    shift: Any
    scale: Any


class Examples(NamedTuple):
    """All examples: inputs float32 or uint8 [M, D], and labels int32 [M] of those that are trained on."""

    inputs: Any
    labels: Any


class Outcome(NamedTuple):
    """The result of a training.

    Attributes:
      logits: float32 [E, C], of the rows `Part.evaluated`.
      losses: float32 [E], negative log-likelihood of these rows' `Examples.labels`.
      loss: float32, mean training loss over the last epoch.
      finite: whether loss and gradients stayed finite.
      params: the head's documented tree.
    """

    logits: Any
    losses: Any
    loss: Any
    finite: Any
    params: Any


def train_head(
    head: nn.Module, schedule: Schedule, hparams: Hparams, seed: Any, part: Part, examples: Examples
) -> tuple[Any, Outcome]:
    """Train a head from its initialisation to the end of the schedule, and predict.

    Args:
      head: the head; its dropout rate comes from the hyper-parameters.
      schedule: what is compiled in.
      hparams: hyper-parameters, float32 scalars.
      seed: uint32 scalar; with the data and the hyper-parameters it decides everything.
      part: which examples.
      examples: all of them.

    Returns:
      (state after the last step, outcome). The head's parameters in the state are in the layout that it trains with.
    """
    model = Classifier(head.clone(dropout_rate=hparams.dropout_rate))
    optimizer = optimizers.make_optimizer("adamw", weight_decay=hparams.weight_decay)

    def apply(variables: Any, rows: jax.Array, **options: Any) -> Any:
        return model.apply(variables, (rows.astype(jnp.float32) - part.shift) * part.scale, **options)

    step = TrainStep(apply, optimizer, partial(target_losses, label_smoothing=hparams.label_smoothing))
    run = partial(run_chunk, step, schedule.batch_size, schedule.batch_size, 1)
    inputs = jax.ShapeDtypeStruct((2, *examples.inputs.shape[1:]), jnp.float32)
    state = step.init(model, inputs, seed)
    layouts: Layouts = {}
    if isinstance(head, ProgressiveSpinalHead):
        layouts = head_layouts(
            training_layout(head.implementation, head.num_layers, schedule.batch_size, masks_layers=False)
        )
    state = convert_state(state, layouts)

    def epoch(state: Any, operands: tuple[jax.Array, jax.Array]) -> tuple[Any, EpochMetrics]:
        index, epoch_rates = operands
        order = part.train[keys.epoch_order(seed, index, len(part.train))]
        plan = EpochPlan(order, hparams.learning_rate * epoch_rates)
        return run(state, EpochMetrics.zero(), seed, plan, jnp.int32(0), jnp.int32(schedule.steps), examples)

    state, totals = lax.scan(epoch, state, (jnp.arange(schedule.epochs), jnp.asarray(schedule.rates())))
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def predict(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs, labels = (array.at[rows].get(mode="promise_in_bounds") for array in examples)
        logits = apply(variables, inputs, train=False).astype(jnp.float32)
        return logits, optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    batches = lax.map(predict, part.evaluated.reshape(-1, schedule.eval_batch_size))
    logits, losses = (values.reshape(-1, *values.shape[2:]) for values in batches)
    loss = totals.loss[-1] / totals.count[-1].astype(jnp.float32)
    finite = jnp.all(totals.bad_step < 0) & jnp.isfinite(loss)
    params = convert_state(state, dict.fromkeys(layouts, "tree")).params["head"]
    return state, Outcome(logits, losses, loss, finite, params)


class Task(NamedTuple):
    """One training.

    Attributes:
      key: whose it is; handed back.
      head: name of its head.
      trial: its hyper-parameters.
      seed: of all random numbers.
      part: which examples; all parts have the same shapes.
    """

    key: Any
    head: str
    trial: Trial
    seed: int
    part: Part


MAX_SLOTS = 64
_SLOTS, _WHOLE = PartitionSpec("data"), PartitionSpec()


class Trainer:
    """The programs of all heads, each compiled when it is first needed, and once.

    Attributes:
      mode: 'loop' or 'vmap'.
      workers: trainings at a time with 'loop'; None for as many as there are cores in a cluster.
      compilations: how many programs were compiled, by head.
      slots: how many trainings are one program; 1 with 'loop'.
    """

    def __init__(
        self,
        heads: dict[str, nn.Module],
        schedule: Schedule,
        max_slots: int,
        mode: Mode = "auto",
        workers: int | None = None,
    ) -> None:
        self._heads, self._schedule, self._mesh = heads, schedule, make_mesh()
        one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
        self.mode = ("loop" if one_cpu else "vmap") if mode == "auto" else mode
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        self.workers: int | None = workers or len(cores)
        self.compilations: dict[str, int] = dict.fromkeys(heads, 0)
        devices = self._mesh.size
        self.slots = 1 if self.mode == "loop" else -(-min(max_slots, MAX_SLOTS) // devices) * devices
        self._programs: dict[str, Callable[..., Outcome]] = {}

    def run(
        self, tasks: Sequence[Task], examples: Examples, with_params: bool = False
    ) -> Iterator[tuple[Task, Outcome, float]]:
        """Yield (task, outcome on the host, seconds of its own) as trainings end.

        Args:
          tasks: what to train; the heads begin in this order.
          examples: all examples, of the same shapes in every call.
          with_params: whether outcomes hold them, else None.
        """
        whole = cut = jax.devices()[0]
        if self.mode == "vmap":
            whole, cut = replicated_on(self._mesh), NamedSharding(self._mesh, _SLOTS)
        resident = Examples(*jax.device_put(tuple(examples), whole))
        by_head = [[task for task in tasks if task.head == head] for head in dict.fromkeys(t.head for t in tasks)]
        groups = [same[i : i + self.slots] for same in by_head for i in range(0, len(same), self.slots)]

        def work(group: list[Task]) -> tuple[list[Task], Outcome, float]:
            start = time.perf_counter()
            outcome = self._programs[group[0].head](*jax.device_put(self._operands(group), cut), resident)
            outcome = jax.device_get(outcome if with_params else outcome._replace(params=None))
            return group, outcome, (time.perf_counter() - start) / len(group)

        pool = ThreadPoolExecutor(self.workers if self.mode == "loop" else 1)
        try:
            list(pool.map(lambda same: self._compile(same[0], resident), by_head))
            for future in as_completed([pool.submit(work, group) for group in groups]):
                group, outcomes, seconds = future.result()
                for index, task in enumerate(group):
                    outcome = outcomes if self.mode == "loop" else jax.tree.map(itemgetter(index), outcomes)
                    yield task, outcome, seconds
        finally:  # on an error, or where nobody asks for more: what has begun is all that still runs
            pool.shutdown(wait=True, cancel_futures=True)

    def _compile(self, task: Task, examples: Examples) -> None:
        if task.head in self._programs:
            return

        def train(hparams: Hparams, seed: Any, part: Part, examples: Examples) -> Outcome:
            return train_head(self._heads[task.head], self._schedule, hparams, seed, part, examples)[1]

        options: dict[str, Any] = {}
        if self.mode == "loop":
            program = jax.jit(train)
            if jax.default_backend() == "cpu":  # the other threads have the other cores
                options["xla_cpu_multi_thread_eigen"] = False
        else:
            specs = (_SLOTS, _SLOTS, _SLOTS, _WHOLE)
            mapped = jax.vmap(train, (0, 0, 0, None))
            # The devices exchange nothing, so there is nothing for shard_map to check.
            sharded = jax.shard_map(mapped, mesh=self._mesh, in_specs=specs, out_specs=_SLOTS, check_vma=False)
            program = jax.jit(sharded, in_shardings=jax.tree.map(partial(NamedSharding, self._mesh), specs))
        self._programs[task.head] = program.lower(*self._operands([task]), examples).compile(options)
        self.compilations[task.head] += 1

    def _operands(self, group: list[Task]) -> tuple[Hparams, Any, Part]:
        """The operands of the program of a group; with 'vmap' along an axis of slots, the last task in those left."""
        as_array: Any = np.float32
        made = [(Hparams(*map(as_array, t.trial.hparams)), np.uint32(t.seed), t.part) for t in group]
        if self.mode == "loop":
            return made[0]
        stacked: tuple[Hparams, Any, Part] = jax.tree.map(
            lambda *leaves: np.stack(leaves), *made, *made[-1:] * (self.slots - len(made))
        )
        return stacked


class RayTrainer(Trainer):
    """The same trainings on a Ray cluster, each on a core of its own; every process there compiles what it runs."""

    def __init__(
        self, heads: dict[str, nn.Module], schedule: Schedule, workers: int | None, address: str | None
    ) -> None:
        super().__init__(heads, schedule, 1, "loop")
        self.workers, self._address = workers, address

    def run(
        self, tasks: Sequence[Task], examples: Examples, with_params: bool = False
    ) -> Iterator[tuple[Task, Outcome, float]]:
        """As `Trainer.run`; raises as `pspinal_jax.ray.run_tasks`."""
        trainer = tuple(self._heads.items()), self._schedule
        calls = [(trainer, task, with_params) for task in tasks]
        with (
            cluster(self._address, self.workers),
            contextlib.closing(run_tasks(_train_there, examples, calls, tasks, self.workers)) as ended,
        ):
            for task, (outcome, seconds, compiled) in ended:
                self.compilations[task.head] += compiled
                yield task, outcome, seconds


def _train_there(
    examples: Examples, trainer: tuple[Any, Schedule], task: Task, with_params: bool
) -> tuple[Outcome, float, int]:
    """One training in a process of a cluster: its outcome, seconds, and how many programs were compiled for it."""
    there = _trainer_there(*trainer, tuple(jax_settings().items()))
    before = there.compilations[task.head]
    ((_, outcome, seconds),) = there.run([task], examples, with_params)
    return outcome, seconds, there.compilations[task.head] - before


@lru_cache(maxsize=4)
def _trainer_there(heads: Any, schedule: Schedule, settings: Any) -> Trainer:
    enable_compilation_cache()
    return Trainer(dict(heads), schedule, 1, "loop", 1)
