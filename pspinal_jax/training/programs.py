"""The one place where jit, donation and shardings are decided."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from pspinal_jax.distributed.arrays import put
from pspinal_jax.heads.layouts import Layout
from pspinal_jax.training import keys
from pspinal_jax.training.chunk import Batch, EpochPlan, Step, evaluate_split, run_chunk
from pspinal_jax.training.layouts import in_layout
from pspinal_jax.training.sharding import (
    BATCH,
    make_mesh,
    per_device,
    replicated_on,
    shard_over,
    shardings,
    shards_parameters,
)
from pspinal_jax.training.state import Totals, TrainState, init_state
from pspinal_jax.training.step import Evaluation, eval_step, train_step


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled pieces of a run. With `vectorized`, states, seeds, totals and orders have a leading seed axis.

    Attributes:
      mesh: the devices, see mesh.py.
      init: seed -> state.
      zero_totals: seed -> totals.
      chunk: (state, totals, seed, plan, first, num_steps, data) -> (state, totals); state and totals are donated.
      tail: number of examples -> the same program for one last batch of so many.
      batch_step: (state, totals, seed, learning_rate, batch) -> (state, totals), one step on a batch that the host
        brings; state and totals are donated. Never vectorised.
      evaluate: (variables, data, count) -> Evaluation.
      keep: (best, candidate, improved) -> best; the older best is donated.
      vectorized: whether all seeds run as one program.
    """

    mesh: Mesh
    init: Callable[..., TrainState]
    zero_totals: Callable[..., Totals]
    chunk: Callable[..., tuple[TrainState, Totals]]
    tail: Callable[[int], Callable[..., tuple[TrainState, Totals]]]
    batch_step: Callable[..., tuple[TrainState, Totals]]
    evaluate: Callable[..., Evaluation]
    keep: Callable[..., Any]
    vectorized: bool

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return replicated_on(self.mesh)

    def replicate(self, tree: Any) -> Any:
        """`tree` on every device of the mesh, whole."""
        return put(tree, self.replicated)

    def place(self, tree: Any) -> Any:
        """A state, or parts of one, where the programs want it: parameters cut as the mesh says."""
        return put(tree, shardings(self.mesh, tree, stacked=self.vectorized))

    def shard_batch(self, batch: Batch) -> Batch:
        """A host's batch spread over the devices."""
        return shard_over(self.mesh, batch)


def build_programs(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    input_shape: tuple[int, ...],
    input_dtype: Any,
    batch_size: int,
    eval_batch_size: int,
    label_smoothing: float,
    vectorized: bool,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    head_layout: Layout = "tree",
    frozen: tuple[str, ...] = (),
    micro_batches: int = 1,
    skip_nonfinite: bool = False,
    mesh: Mesh | None = None,
    batch_norm_per_device: bool = False,
) -> Programs:
    """Everything that a run calls, jitted for a mesh of devices.

    The data lies on every device whole; batches and parameters are cut as mesh.py and partition.py say. XLA inserts
    the exchanges, so that the programs compute what one device would, batch norm over the whole batch included.

    Args:
      model: called as ``model.apply(variables, inputs, train=...)``.
      optimizer: gives the direction of descent.
      input_shape: one example's shape.
      input_dtype: its dtype.
      batch_size: examples per step over all devices, a multiple of the mesh's data times fsdp.
      eval_batch_size: examples per evaluation step, likewise.
      label_smoothing: see `cross_entropy`.
      vectorized: run all seeds as one program, over a leading axis.
      augment: (key, inputs) -> inputs, applied to every training batch on the device; None for none.
      head_layout: the form of the head's parameters inside a chunk; all that goes in and out is the documented tree.
      frozen: entries at the top of the parameters that are not trained.
      micro_batches: see `train_step`; the last, smaller batch of an epoch is not cut.
      skip_nonfinite: see `train_step`.
      mesh: the devices, as `make_mesh` gives them; by default all of them on the axis data.
      batch_norm_per_device: normalise each device's share of a training batch by itself; the last, smaller batch of an
        epoch is normalised whole. Parameters must not be cut.
    """
    mesh = mesh or make_mesh()
    replicated = replicated_on(mesh)
    inputs = jax.ShapeDtypeStruct((2, *input_shape), input_dtype)
    start = partial(init_state, model, optimizer, inputs, frozen)

    def sharded(batch: Batch) -> Batch:
        return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH))

    options: Any = {"label_smoothing": label_smoothing, "frozen": frozen, "skip_nonfinite": skip_nonfinite}
    plain_step = partial(train_step, model.apply, optimizer, **options)
    whole_step: Step = partial(plain_step, micro_batches=micro_batches)
    if batch_norm_per_device:
        whole_step = per_device(mesh, whole_step)

    def advance(
        take: Step, state: TrainState, totals: Totals, batch: Batch, rate: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Totals]:
        if augment is not None:
            batch = (augment(keys.augment_key(key), batch[0]), batch[1])
        state, totals = take(state, totals, batch, rate, key)
        if shards_parameters(mesh):  # or XLA may gather in one step what it has to cut again in the next
            state = jax.lax.with_sharding_constraint(state, shardings(mesh, state))
        return state, totals

    def step(
        state: TrainState, totals: Totals, batch: Batch, rate: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Totals]:
        return advance(whole_step, state, totals, sharded(batch), rate, key)

    tail_step = partial(advance, plain_step)

    def batch_step(state: TrainState, totals: Totals, seed: jax.Array, rate: jax.Array, batch: Batch) -> Any:
        whole = len(batch[1]) == batch_size
        return (step if whole else tail_step)(state, totals, batch, rate, keys.step_key(seed, state.step))

    def evaluate(variables: Any, data: Batch, count: jax.Array) -> Evaluation:
        def one(batch: Batch, mask: jax.Array) -> Evaluation:
            return eval_step(model.apply, variables, sharded(batch), mask)

        return evaluate_split(one, eval_batch_size, data, count)

    def seeds(function: Callable[..., Any], axes: tuple[Any, ...]) -> Callable[..., Any]:
        return jax.vmap(function, axes) if vectorized else function

    def steps(step: Step, size: int) -> Callable[..., tuple[TrainState, Totals]]:
        axes = (0, 0, 0, EpochPlan(0, 0), None, None, None)
        run = in_layout(head_layout, frozen, partial(run_chunk, step, size, batch_size))
        return jit(seeds(run, axes), donate_argnums=(0, 1), out_shardings=(states, replicated))

    @cache
    def tail(size: int) -> Callable[..., tuple[TrainState, Totals]]:
        return steps(tail_step, size)

    jit = partial(jax.jit, out_shardings=replicated)
    states: Any = replicated
    variables: Any = replicated
    if shards_parameters(mesh):
        shapes = jax.eval_shape(seeds(start, (0,)), jax.ShapeDtypeStruct((1,) if vectorized else (), np.uint32))
        states = shardings(mesh, shapes, stacked=vectorized)
        variables = {"params": states.params, "batch_stats": states.batch_stats}
    return Programs(
        mesh=mesh,
        init=jit(seeds(start, (0,)), out_shardings=states),
        zero_totals=jit(seeds(lambda seed: Totals.zero(), (0,))),
        chunk=steps(step, batch_size),
        tail=tail,
        batch_step=jit(batch_step, donate_argnums=(0, 1), out_shardings=(states, replicated)),
        evaluate=jit(seeds(evaluate, (0, None, None))),
        keep=jit(seeds(_keep, (0, 0, 0)), donate_argnums=0, out_shardings=variables),
        vectorized=vectorized,
    )


def _keep(best: Any, candidate: Any, improved: jax.Array) -> Any:
    return jax.tree.map(partial(jnp.where, improved), candidate, best)


def make_order(subset: np.ndarray, length: int, vectorized: bool, shuffle: bool = True) -> Callable[..., jax.Array]:
    """(seed, epoch) -> int32 [length]: the examples `subset` in the epoch's order, then zeros.

    Without `shuffle` every epoch has the order of `subset`.

    The fixed length lets every stage of a run, with its own subset, use the same compiled chunk.
    """

    def order(seed: jax.Array, epoch: jax.Array) -> jax.Array:
        visited = jnp.asarray(subset, jnp.int32)
        if shuffle:
            visited = visited[keys.epoch_order(seed, epoch, len(subset))]
        return jnp.pad(visited, (0, length - len(subset)))

    return jax.jit(jax.vmap(order, (0, None)) if vectorized else order)


def padded_split(inputs: np.ndarray, labels: np.ndarray, batch_size: int) -> Batch:
    """Host arrays of a split, padded with zeros to a multiple of `batch_size`."""
    extra = -len(labels) % batch_size
    return np.pad(inputs, [(0, extra)] + [(0, 0)] * (inputs.ndim - 1)), np.pad(labels, (0, extra))
