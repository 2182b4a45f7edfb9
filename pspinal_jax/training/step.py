"""One training step and one evaluation step: pure functions of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pspinal_jax.training.state import Totals, TrainState

Apply = Callable[..., Any]
"""linen's ``model.apply``."""


class Evaluation(NamedTuple):
    """Result of evaluating a batch or a split.

    Attributes:
      loss: float32, sum of the examples' losses.
      correct: int32, examples classified correctly.
      predictions: int32 [N], the most probable class of each example, padding included.
    """

    loss: jax.Array
    correct: jax.Array
    predictions: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of each example.

    Args:
      logits: [N, C]; computed in float32 or wider.
      labels: integers [N].
      label_smoothing: share of the target that is spread evenly over the C classes.

    Returns:
      [N], in nats.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    return losses


def train_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    label_smoothing: float,
    state: TrainState,
    totals: Totals,
    batch: tuple[jax.Array, jax.Array],
    learning_rate: jax.Array,
    key: jax.Array,
) -> tuple[TrainState, Totals]:
    """The state and the epoch's sums after one gradient step.

    Args:
      apply: the model.
      optimizer: gives the direction of descent.
      label_smoothing: see `cross_entropy`.
      state: state before the step.
      totals: the epoch's sums before the step.
      batch: (inputs [B, ...], labels [B]).
      learning_rate: float32 scalar.
      key: key of the step's random numbers.
    """
    inputs, labels = batch

    def mean_loss(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = apply(variables, inputs, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        loss = cross_entropy(logits, labels, label_smoothing).mean()
        return loss, (updated.get("batch_stats", {}), logits)

    (loss, (batch_stats, logits)), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    direction, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    new_state = TrainState(
        step=state.step + 1,
        params=jax.tree.map(lambda p, d: p - learning_rate.astype(p.dtype) * d, state.params, direction),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    new_totals = Totals(
        loss=totals.loss + loss.astype(totals.loss.dtype) * len(labels),
        correct=totals.correct + jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.int32),
        count=totals.count + len(labels),
    )
    return new_state, new_totals


def eval_step(apply: Apply, variables: Any, batch: tuple[jax.Array, jax.Array], mask: jax.Array) -> Evaluation:
    """Loss and hits over the examples of `batch` (inputs [B, ...], labels [B]) where `mask` bool [B] is True."""
    inputs, labels = batch
    logits = apply(variables, inputs, train=False)
    predictions = jnp.argmax(logits, -1).astype(jnp.int32)
    losses = cross_entropy(logits, labels)
    return Evaluation(
        loss=jnp.sum(jnp.where(mask, losses, 0)),
        correct=jnp.sum((predictions == labels) & mask, dtype=jnp.int32),
        predictions=predictions,
    )
