"""The compiled programs, where jit, donation and shardings are decided, and the seeds' states, which they move."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from pspinal_jax.distributed import put
from pspinal_jax.environment import jit_with
from pspinal_jax.training import keys
from pspinal_jax.training.sharding import (
    batch_sharding,
    divisible_size,
    make_mesh,
    per_device,
    replicated_on,
    shard_batch,
    shardings,
    shards_parameters,
)
from pspinal_jax.training.state import Layouts, Totals, TrainState, in_layouts, init_state
from pspinal_jax.training.step import (
    Batch,
    EpochPlan,
    EvalStep,
    Evaluation,
    Step,
    TrainStep,
    count_rows,
    evaluate_split,
    run_chunk,
)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the steps of a run are executed, beside what they compute.

    Attributes:
      inputs: shape and dtype of one example's inputs, without the batch axis: `jax.ShapeDtypeStruct` or a tree of them.
      batch_size: examples per step over all devices; each computes them all unless they divide over the devices.
      eval_batch_size: examples per evaluation step; rounded up to a multiple of the devices that they divide over.
      labels: shape and dtype of one example's labels, likewise.
      vectorized: run all seeds as one program, over a leading axis.
      head_layouts: of heads' variables inside a chunk; what goes in and out is the documented tree.
      mesh: the devices; by default all of them on the axis data.
      compiler_options: XLA's, for the programs that train and evaluate.
      batch_norm_per_device: normalise each device's part of a training batch by itself; the last, smaller batch of an
        epoch is normalised whole. Parameters must not be sharded.
    """

    inputs: Any
    batch_size: int
    eval_batch_size: int
    labels: Any = dataclasses.field(default_factory=lambda: jax.ShapeDtypeStruct((), np.int32))
    vectorized: bool = False
    head_layouts: Layouts = dataclasses.field(default_factory=dict)
    mesh: Mesh = dataclasses.field(default_factory=make_mesh)
    compiler_options: Mapping[str, bool | str] = dataclasses.field(default_factory=dict)
    batch_norm_per_device: bool = False


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled pieces of a run. With `vectorized`, states, seeds, totals and orders have a leading seed axis.

    Attributes:
      mesh: the devices, see sharding.py.
      init: seed -> state.
      zero_totals: seed -> totals.
      chunk: (state, totals, seed, plan, first, num_steps, data) -> (state, totals); state and totals are donated.
      tail: number of examples -> the same program for one last batch of so many.
      batch_step: (state, totals, seed, learning_rate, batch) -> (state, totals), one step on a batch that the host
        brings; state and totals are donated. Never vectorised.
      evaluate: (variables, data, count) -> Evaluation; data of a multiple of `eval_batch_size` examples.
      eval_batch_size: examples per evaluation step.
      logits: whether variables have a leading seed axis -> the program (variables, inputs) -> logits in evaluation.
      update_best: (best, candidate, improved) -> best; the older best is donated.
      vectorized: whether all seeds run as one program.
      compiler_options: XLA's, of what trains and evaluates.
    """

    mesh: Mesh
    init: Callable[..., TrainState]
    zero_totals: Callable[..., Totals]
    chunk: Callable[..., tuple[TrainState, Totals]]
    tail: Callable[[int], Callable[..., tuple[TrainState, Totals]]]
    batch_step: Callable[..., tuple[TrainState, Totals]]
    evaluate: Callable[..., Evaluation]
    eval_batch_size: int
    logits: Callable[[bool], Callable[..., jax.Array]]
    update_best: Callable[..., Any]
    vectorized: bool
    compiler_options: Mapping[str, bool | str]

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return replicated_on(self.mesh)

    def replicate(self, tree: Any) -> Any:
        """`tree` on every device of the mesh, whole."""
        return put(tree, self.replicated)

    def place(self, tree: Any) -> Any:
        """A state, or parts of one, where the programs want it: parameters sharded as the mesh says."""
        return put(tree, shardings(self.mesh, tree, stacked=self.vectorized))

    def shard_batch(self, batch: Batch) -> Batch:
        """A host's batch spread over the devices."""
        return shard_batch(self.mesh, batch)


def build_programs(model: Any, train_step: TrainStep, eval_step: EvalStep, execution: Execution) -> Programs:
    """Everything that a run calls, jitted for a mesh of devices.

    The data lies on every device whole; batches and parameters are sharded as sharding.py says. XLA inserts the
    exchanges, so that the programs compute what one device would, batch norm over the whole batch included.

    Args:
      model: initialised as ``model.init(key, inputs, train=False)``; the steps apply it.
      train_step: the training step. The last, smaller batch of an epoch is not split into micro-batches.
      eval_step: the evaluation step.
      execution: how and where.
    """
    mesh, vectorized = execution.mesh, execution.vectorized
    eval_batch_size = divisible_size(mesh, execution.eval_batch_size)
    replicated = replicated_on(mesh)
    inputs, labels = (_batch_of_two(tree) for tree in (execution.inputs, execution.labels))

    def seeds(function: Callable[..., Any], axes: tuple[Any, ...] = (0,)) -> Callable[..., Any]:
        return jax.vmap(function, axes) if vectorized else function

    initial = partial(init_state, model, train_step.optimizer, inputs, train_step.frozen, train_step.ema_decay > 0)
    start = seeds(initial)
    states: Any = replicated
    variables: Any = replicated
    if shards_parameters(mesh):
        shapes = jax.eval_shape(start, jax.ShapeDtypeStruct((1,) if vectorized else (), np.uint32))
        states = shardings(mesh, shapes, stacked=vectorized)
        variables = {"params": states.params, "batch_stats": states.batch_stats}
    jit = partial(jax.jit, out_shardings=replicated)
    jit_with_options = partial(jit_with, execution.compiler_options)
    jit_steps = partial(jit_with_options, donate_argnums=(0, 1), out_shardings=(states, replicated))
    whole_step, tail_step = _place_steps(train_step, execution)

    def chunk(step: Step, size: int) -> Callable[..., tuple[TrainState, Totals]]:
        run = in_layouts(
            execution.head_layouts, train_step.frozen, partial(run_chunk, step, size, execution.batch_size)
        )
        return jit_steps(seeds(run, (0, 0, 0, EpochPlan(0, 0), None, None, None)))

    def batch_step(state: TrainState, totals: Totals, seed: jax.Array, rate: jax.Array, batch: Batch) -> Any:
        take = whole_step if count_rows(batch) == execution.batch_size else tail_step
        return take(state, totals, batch, rate, keys.step_key(seed, state.step))

    def evaluate(variables: Any, data: Batch, count: jax.Array) -> Evaluation:
        def one(batch: Batch, mask: jax.Array) -> Evaluation:
            return eval_step(variables, _sharded(mesh, batch), mask)

        return evaluate_split(one, eval_batch_size, data, count)

    def logits(stacked: bool) -> Callable[..., jax.Array]:
        apply = partial(eval_step.apply, train=False)
        return jit_with_options(jax.vmap(apply, (0, None)) if stacked else apply, out_shardings=replicated)

    def zero_totals(seed: jax.Array) -> Totals:
        state = jax.eval_shape(initial, jax.ShapeDtypeStruct((), np.uint32))
        sums = jax.eval_shape(eval_step, state.variables, (inputs, labels), jax.ShapeDtypeStruct((2,), bool))
        return Totals.zero({name: sums.metrics[name].dtype for name in train_step.metrics})

    return Programs(
        mesh=mesh,
        init=jit(start, out_shardings=states),
        zero_totals=jit(seeds(zero_totals)),
        chunk=chunk(whole_step, execution.batch_size),
        tail=cache(partial(chunk, tail_step)),
        batch_step=jit_steps(batch_step),
        evaluate=jit_with_options(seeds(evaluate, (0, None, None)), out_shardings=replicated),
        eval_batch_size=eval_batch_size,
        logits=cache(logits),
        update_best=jit(seeds(_update_best, (0, 0, 0)), donate_argnums=0, out_shardings=variables),
        vectorized=vectorized,
        compiler_options=execution.compiler_options,
    )


def _batch_of_two(example: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), example)


def _place_steps(step: TrainStep, execution: Execution) -> tuple[Step, Step]:
    """`step` over the devices: on a whole batch, and on the last, smaller batch of an epoch."""
    mesh = execution.mesh
    last_step = dataclasses.replace(step, micro_batches=1)
    descend = per_device(mesh, step.descend) if execution.batch_norm_per_device else step.descend

    def advance(
        take: Step, state: TrainState, totals: Totals, batch: Batch, rate: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Totals]:
        state, totals = take(state, totals, step.prepare(batch, key), rate, key)
        if shards_parameters(mesh):  # or XLA may gather in one step what it has to shard again in the next
            state = jax.lax.with_sharding_constraint(state, shardings(mesh, state))
        return state, totals

    def whole_step(
        state: TrainState, totals: Totals, batch: Batch, rate: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Totals]:
        return advance(descend, state, totals, _sharded(mesh, batch), rate, key)

    return whole_step, partial(advance, last_step.descend)


def _sharded(mesh: Mesh, batch: Batch) -> Batch:
    return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh, count_rows(batch)))


def _update_best(best: Any, candidate: Any, improved: jax.Array) -> Any:
    return jax.tree.map(partial(jnp.where, improved), candidate, best)


def make_order(
    subset: np.ndarray, length: int, vectorized: bool, shuffle: bool = True, balanced: np.ndarray | None = None
) -> Callable[..., jax.Array]:
    """(seed, epoch) -> int32 [length]: the examples `subset` in the epoch's order, then zeros.

    Without `shuffle` every epoch has the order of `subset`. With the labels [N] of all examples as `balanced`, the
    epoch draws as many of `subset`, evenly from its classes; see `balanced_order`.

    The fixed length lets every stage of a run, with its own subset, use the same compiled chunk.
    """
    if balanced is None:
        return partial(_order, length, shuffle, np.asarray(subset, np.int32))
    classes = balanced[subset]

    def order(seed: jax.Array, epoch: jax.Array) -> jax.Array:
        visited = jnp.asarray(subset, jnp.int32)[keys.balanced_order(seed, epoch, classes)]
        return jnp.pad(visited, (0, length - len(subset)))

    return jax.jit(jax.vmap(order, (0, None)) if vectorized else order)


@partial(jax.jit, static_argnums=(0, 1))
def _order(length: int, shuffle: bool, subset: jax.Array, seed: jax.Array, epoch: jax.Array) -> jax.Array:
    """See `make_order`; compiled once for all runs on as many examples."""
    if jnp.ndim(seed):
        return jax.vmap(partial(_order, length, shuffle, subset), (0, None))(seed, epoch)
    visited = subset[keys.epoch_order(seed, epoch, len(subset))] if shuffle else subset
    return jnp.pad(visited, (0, length - len(subset)))


def padded_split(split: Batch, batch_size: int) -> Batch:
    """Host arrays (inputs, labels) of a split, padded with zeros to a multiple of `batch_size`."""
    extra = -count_rows(split) % batch_size
    return jax.tree.map(lambda array: np.pad(array, [(0, extra)] + [(0, 0)] * (array.ndim - 1)), split)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Steps of an epoch, and the data that they take.

    Attributes:
      first: number of the first step in the epoch.
      steps: how many.
      data: all examples, on the devices; the steps gather their batches there. None where batches are brought.
      tail_size: examples of the last, smaller batch, if this is the one; else 0.
      batches: a step's batches, one for each seed, until they are used up; there may be fewer than `steps`.
    """

    first: int
    steps: int
    data: Batch | None = None
    tail_size: int = 0
    batches: Iterable[Iterable[Batch]] = ()


@dataclasses.dataclass
class _Group:
    """One program's worth of state: a seed, or all of them along a leading axis."""

    seed: jax.Array
    state: TrainState
    totals: Totals
    best: Any
    plan: EpochPlan | None = None
    rates: np.ndarray | None = None


class SeedStates:
    """K seeds in training.

    One group per seed when they run one after the other; a single group with a leading axis when vectorised. Either way
    the checkpointed trees are the same: plain for one seed, with a leading axis of length K for more.
    """

    def __init__(self, programs: Programs, seeds: list[int]) -> None:
        self._programs = programs
        self.seeds = seeds
        self.epoch = 0
        """The planned epoch's number."""
        groups: list[Any] = [seeds] if programs.vectorized else seeds
        self._groups = [self._start(programs.replicate(np.asarray(group, np.uint32))) for group in groups]

    def _start(self, seed: jax.Array) -> _Group:
        state = self._programs.init(seed)
        return _Group(seed, state, self._programs.zero_totals(seed), _variables(state, copy=True))

    def start_from(self, variables: dict[str, Any]) -> None:
        """Start every seed from these variables (of one seed) in place of its own initialisation.

        Args:
          variables: 'params' and 'batch_stats', or parts of them; what is absent stays as initialised.
        """

        def place(new: Any, old: jax.Array) -> jax.Array:
            return put(np.broadcast_to(np.asarray(new, old.dtype), old.shape), old.sharding)

        for group in self._groups:
            for name, given in variables.items():
                there = flatten_dict(getattr(group.state, name), keep_empty_nodes=True)
                fresh = {path: place(leaf, there[path]) for path, leaf in flatten_dict(given).items()}
                group.state = group.state.replace(**{name: unflatten_dict(there | fresh)})  # type: ignore[attr-defined]
            group.state = _averaging_anew(group.state)
            group.best = _variables(group.state, copy=True)

    def continue_from_best(self, other: "SeedStates") -> None:
        """Start every seed from the parameters and statistics that were best in `other`."""
        for group, finished in zip(self._groups, other._groups, strict=True):
            group.state = group.state.replace(  # type: ignore[attr-defined]
                step=finished.state.step, **jax.tree.map(jnp.copy, finished.best)
            )
            group.state = _averaging_anew(group.state)
            group.best = _variables(group.state, copy=True)

    def plan_epoch(self, order: Any, epoch: int, rates: np.ndarray) -> None:
        """Fix the order and the learning rates [K, S] of the coming epoch, counted from 0."""
        self.epoch = epoch
        for index, group in enumerate(self._groups):
            indices = self._programs.replicate(order(group.seed, np.int32(epoch)))
            group_rates = rates if self._programs.vectorized else rates[index]
            group.plan = EpochPlan(indices, self._programs.replicate(group_rates))
            group.rates = group_rates

    def orders(self) -> list[np.ndarray]:
        """The planned epoch's order of each group, int32, on the host: [N], or [K, N] of all seeds as one program."""
        return [np.asarray(group.plan.order) for group in self._groups if group.plan is not None]

    def examples(self, index: int, step: int, batch_size: int) -> np.ndarray:
        """Which training examples the seed at `index` sees in step `step` of the planned epoch."""
        order = self.orders()[0][index] if self._programs.vectorized else self.orders()[index]
        return order[step * batch_size : (step + 1) * batch_size]

    def learning_rate(self, index: int, step: int) -> float:
        """The learning rate of that step."""
        group = self._groups[0 if self._programs.vectorized else index]
        assert group.rates is not None
        return float(group.rates[index, step] if self._programs.vectorized else group.rates[step])

    def variables(self, *, best: bool) -> dict[str, Any]:
        """The best or the current parameters and statistics, of one seed, or of K with a leading axis."""
        variables: dict[str, Any] = self._stack(
            [group.best if best else _variables(group.state) for group in self._groups]
        )
        return variables

    @property
    def state(self) -> TrainState:
        """The state of one seed, or of K with a leading axis: a view that the next step may overwrite."""
        states = [group.state for group in self._groups]
        stacked: TrainState = self._stack(states)
        return stacked

    def warm_up(self) -> None:
        """Compile `update_best`, by updating none."""
        for group in self._groups:
            group.best = self._programs.update_best(
                group.best, _variables(group.state), np.zeros(group.seed.shape, bool)
            )

    def compile_step(self, batch: Batch) -> None:
        """Compile a step on a batch from the host, by taking it with a copy of a state."""
        group = self._groups[0]
        state, totals = jax.tree.map(jnp.copy, (group.state, group.totals))
        jax.block_until_ready(self._programs.batch_step(state, totals, group.seed, np.float32(0), batch))

    def run(self, chunk: Chunk) -> int:
        """Take the steps of `chunk` for every seed; returns how many when they are done."""
        if chunk.data is not None:
            self._run_in_memory(chunk)
            taken = chunk.steps
        else:
            taken = 0
            for batches in chunk.batches:
                for group, batch in zip(self._groups, batches, strict=True):
                    assert group.rates is not None
                    rate = group.rates[min(chunk.first + taken, len(group.rates) - 1)]
                    group.state, group.totals = self._programs.batch_step(
                        group.state, group.totals, group.seed, rate, batch
                    )
                taken += 1
        jax.block_until_ready([group.totals for group in self._groups])
        return taken

    def _run_in_memory(self, chunk: Chunk) -> None:
        program = self._programs.tail(chunk.tail_size) if chunk.tail_size else self._programs.chunk
        for group in self._groups:
            group.state, group.totals = program(
                group.state,
                group.totals,
                group.seed,
                group.plan,
                np.int32(chunk.first),
                np.int32(chunk.steps),
                chunk.data,
            )

    def idle(self, index: int) -> bool:
        """Whether the devices have done all that the seed at `index` asked of them."""
        return bool(self._groups[index].totals.count.is_ready())

    def totals(self) -> dict[str, list[Any]]:
        """The epoch's sums so far, by the fields of `Totals`, each with an entry per seed."""
        groups = [group.totals.sums for group in self._groups]
        return {name: self._gather([sums[name] for sums in groups]).tolist() for name in groups[0]}

    def set_totals(self, totals: dict[str, list[Any]] | None) -> None:
        """Set the epoch's sums, to zero for None."""
        for index, group in enumerate(self._groups):
            group.totals = zero = self._programs.zero_totals(group.seed)
            if totals is not None:
                pick = slice(None) if self._programs.vectorized else index
                sums = {name: np.asarray(totals[name], leaf.dtype)[pick] for name, leaf in zero.sums.items()}
                metrics = {name: sums.pop(name) for name in zero.metrics}
                group.totals = self._programs.replicate(Totals(metrics=metrics, **sums))

    def evaluate(self, data: Batch, count: int, *, best: bool = False) -> dict[str, np.ndarray]:
        """Sums of loss and metrics [K], predictions [K, M], of the current or the best parameters on a padded split."""
        results = [
            self._programs.evaluate(group.best if best else _variables(group.state), data, np.int32(count))
            for group in self._groups
        ]
        sums = [{**result.metrics, "loss": result.loss, "predictions": result.predictions} for result in results]
        return {name: self._gather([each[name] for each in sums]) for name in sums[0]}

    def update_best(self, improved: np.ndarray) -> None:
        """Make the current parameters the best of every seed where `improved` bool [K] says so."""
        for index, group in enumerate(self._groups):
            flags = improved if self._programs.vectorized else improved[index]
            if np.any(flags):
                group.best = self._programs.update_best(group.best, _variables(group.state), flags)

    def trees(self) -> dict[str, Any]:
        """The arrays of a checkpoint, by item."""
        states = [group.state for group in self._groups]
        return {
            "params": self._stack([state.params for state in states]),
            "batch_stats": self._stack([state.batch_stats for state in states]),
            "opt_state": self._stack([state.opt_state for state in states]),
            "ema": self._stack([state.ema for state in states]),
            "best": self._stack([group.best for group in self._groups]),
        }

    def set_trees(self, trees: dict[str, Any], step: int) -> None:
        """Go on from a checkpoint's arrays, taken `step` steps into the stage."""
        for index, group in enumerate(self._groups):
            picked = {name: self._pick(tree, index) for name, tree in trees.items()}
            group.best = self._programs.place(picked.pop("best"))
            steps = jnp.full_like(group.state.step, step)
            group.state = self._programs.place(TrainState(step=steps, **picked))

    def _stack(self, trees: list[Any]) -> Any:
        if len(trees) == 1:
            return trees[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def _pick(self, tree: Any, index: int) -> Any:
        if len(self._groups) == 1:
            return tree
        return jax.tree.map(lambda leaf: leaf[index], tree)

    def _gather(self, values: list[jax.Array]) -> np.ndarray:
        if self._programs.vectorized:
            return np.asarray(values[0])
        return np.stack([np.asarray(value) for value in values])


def _variables(state: TrainState, *, copy: bool = False) -> dict[str, Any]:
    return jax.tree.map(jnp.copy, state.variables) if copy else state.variables


def _averaging_anew(state: TrainState) -> TrainState:
    """`state` with its moving averages begun at its parameters and running statistics, which were replaced."""
    current = {"params": state.params, "batch_stats": state.batch_stats}
    ema = {name: {entry: current[name][entry] for entry in tree} for name, tree in state.ema.items()}
    return state.replace(ema=jax.tree.map(jnp.copy, ema))  # type: ignore[attr-defined]
