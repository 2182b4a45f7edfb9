"""Many steps as one compiled program, over data that lies on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pspinal_jax.training import keys
from pspinal_jax.training.state import Totals, TrainState
from pspinal_jax.training.step import Evaluation, count_rows

Batch = tuple[Any, Any]
"""(inputs, labels), on the host or on devices."""
Step = Callable[[TrainState, Totals, Batch, jax.Array, jax.Array], tuple[TrainState, Totals]]


class EpochPlan(NamedTuple):
    """What an epoch will do, as arrays.

    Attributes:
      order: int32 [N], the examples in the order of their visit; entries past the epoch's examples are not used.
      learning_rates: float32 [S], of each step of the epoch.
    """

    order: Any
    learning_rates: Any


def run_chunk(
    step: Step,
    batch_size: int,
    stride: int,
    state: TrainState,
    totals: Totals,
    seed: jax.Array,
    plan: EpochPlan,
    first: jax.Array,
    num_steps: jax.Array,
    data: Batch,
) -> tuple[TrainState, Totals]:
    """Consecutive training steps of an epoch.

    The number of steps is an operand, not part of the program: one compilation serves every chunk length, and since
    every length runs the very same instructions, results do not depend on how an epoch is split into chunks. (A
    lax.scan is the same loop with its length compiled in.)

    Args:
      step: the training step.
      batch_size: examples per step.
      stride: where step i of the epoch starts in the order, divided by i; `batch_size` but for a smaller last batch.
      state: state before the chunk.
      totals: the epoch's sums before the chunk.
      seed: uint32 scalar.
      plan: the epoch's order and learning rates.
      first: int32 scalar, the chunk's first step, counted within the epoch.
      num_steps: int32 scalar.
      data: all training examples, (inputs [N, ...], labels [N]).

    Returns:
      (state, totals) after the chunk.
    """
    # All keys of the epoch at once: on CPU the few dozen tiny kernels of a key cost as much as a layer's product.
    step_keys = keys.step_keys(seed, state.step - first, len(plan.learning_rates))

    def body(index: jax.Array, carry: tuple[TrainState, Totals]) -> tuple[TrainState, Totals]:
        state, totals = carry
        rows = lax.dynamic_slice(plan.order, (index * stride,), (batch_size,))
        batch = jax.tree.map(lambda array: array.at[rows].get(mode="promise_in_bounds"), data)
        return step(state, totals, batch, plan.learning_rates[index], step_keys[index])

    return lax.fori_loop(first, first + num_steps, body, (state, totals))


def evaluate_split(
    step: Callable[[Batch, jax.Array], Evaluation], batch_size: int, data: Batch, count: jax.Array
) -> Evaluation:
    """Exact evaluation of a split whose arrays are padded to whole batches.

    Args:
      step: evaluation of one batch (inputs, labels) under a mask bool [B].
      batch_size: B.
      data: (inputs [M, ...], labels [M]), M a multiple of B.
      count: int32 scalar, how many of the M are real; batches without a real example are not computed.

    Returns:
      Sums over the real examples, and the predictions [M].
    """
    length = count_rows(data)

    def body(index: jax.Array, sums: Evaluation) -> Evaluation:
        start = index * batch_size
        batch = jax.tree.map(lambda array: lax.dynamic_slice_in_dim(array, start, batch_size), data)
        result = step(batch, start + jnp.arange(batch_size) < count)
        return Evaluation(
            loss=sums.loss + result.loss.astype(sums.loss.dtype),
            metrics=jax.tree.map(jnp.add, sums.metrics, result.metrics),
            predictions=lax.dynamic_update_slice_in_dim(sums.predictions, result.predictions, start, 0),
        )

    first = jax.tree.map(lambda array: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype), data)
    sums = jax.eval_shape(step, first, jax.ShapeDtypeStruct((batch_size,), bool))
    metrics = jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), sums.metrics)
    nothing = Evaluation(jnp.zeros((), jnp.float32), metrics, jnp.zeros(length, jnp.int32))
    return lax.fori_loop(0, (count + batch_size - 1) // batch_size, body, nothing)
