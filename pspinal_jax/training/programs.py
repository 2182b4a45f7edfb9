"""The one place where jit, donation and shardings are decided."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pspinal_jax.distributed import put
from pspinal_jax.environment import jit_with
from pspinal_jax.training import keys
from pspinal_jax.training.chunk import Batch, EpochPlan, Step, evaluate_split, run_chunk
from pspinal_jax.training.layouts import Layouts, in_layouts
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
from pspinal_jax.training.state import Totals, TrainState, init_state
from pspinal_jax.training.step import EvalStep, Evaluation, TrainStep, count_rows


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
