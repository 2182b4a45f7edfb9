"""A whole training as one pure function of arrays, so that all trials and seeds of a head are one program.

Labels of what is evaluated are no argument: a program gives predictions, and whoever has the labels counts. Trials are
given no test example either; zeros stand in their place.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from pspinal_jax.comparison.settings import Setting
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.heads.layouts import training_layout
from pspinal_jax.models import Classifier
from pspinal_jax.training import keys
from pspinal_jax.training.chunk import EpochPlan, run_chunk
from pspinal_jax.training.layouts import convert_state, head_layouts
from pspinal_jax.training.optimizers import Schedule, learning_rates, make_optimizer
from pspinal_jax.training.state import Totals, init_state
from pspinal_jax.training.step import TrainStep, target_losses


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled in, beside the head.

    Attributes:
      epochs: passes over the training part.
      batch_size: examples a step; the last, smaller batch of an epoch is left out (other examples each epoch).
      eval_batch_size: examples predicted at a time.
      schedule: of the learning rate, with a peak of 1.
      momentum: of AdamW.
    """

    epochs: int
    batch_size: int
    eval_batch_size: int
    schedule: Schedule
    momentum: float = 0.9

    def rates(self, num_train: int) -> np.ndarray:
        """The schedule as float32 [epochs, steps]."""
        steps = num_train // self.batch_size
        return np.stack([learning_rates(self.schedule, epoch, steps, self.epochs) for epoch in range(self.epochs)])


class Part(NamedTuple):
    """Which examples a training sees, and how.

    Attributes:
      train: int32 [N], rows of the examples that are trained on.
      evaluated: int32 [E], rows of those to predict, padded to a multiple of `eval_batch_size`.
      count: int32 scalar, how many of these are predicted.
      shift: float32 [D] or scalar, subtracted from every example ..
      scale: .. and what it is multiplied with after that.
    """

    train: Any
    evaluated: Any
    count: Any
    shift: Any
    scale: Any


class Examples(NamedTuple):
    """All examples: inputs float32 or uint8 [M, D], and labels int32 [M] of those that are trained on."""

    inputs: Any
    labels: Any


class Outcome(NamedTuple):
    """What comes out of a training.

    Attributes:
      predictions: int32 [E], of the rows `Part.evaluated`; past `Part.count`, -1.
      losses: float32 [E], negative log-likelihood of what `Examples.labels` says of these rows; past `Part.count`, 0.
      loss: float32, mean training loss over the last epoch.
      finite: whether loss and gradients stayed finite.
    """

    predictions: Any
    losses: Any
    loss: Any
    finite: Any


def train_head(
    head: nn.Module, plan: Plan, setting: Setting, seed: jax.Array, rates: jax.Array, part: Part, examples: Examples
) -> tuple[Any, Outcome]:
    """Train a head from its initialisation to the end of the schedule, and predict.

    Args:
      head: the head; its dropout rate is the setting's.
      plan: what is compiled in.
      setting: hyper-parameters, float32 scalars.
      seed: uint32 scalar; with the data and the setting it decides everything.
      rates: float32 [epochs, steps], see `Plan.rates`.
      part: which examples.
      examples: all of them.

    Returns:
      (state after the last step, outcome). The head's parameters in the state are in the layout that it trains with.
    """
    model = Classifier(head.clone(dropout_rate=setting.dropout_rate))
    optimizer = make_optimizer("adamw", plan.momentum, weight_decay=setting.weight_decay)

    def apply(variables: Any, rows: jax.Array, **options: Any) -> Any:
        rows = (rows.astype(jnp.float32) - part.shift) * part.scale
        return model.apply(variables, rows, **options)

    step = TrainStep(apply, optimizer, partial(target_losses, label_smoothing=setting.label_smoothing))
    inputs = jax.ShapeDtypeStruct((2, *examples.inputs.shape[1:]), jnp.float32)
    state = init_state(model, optimizer, inputs, (), False, seed)
    if isinstance(head, ProgressiveSpinalHead):
        layout = training_layout(head.implementation, head.num_layers, plan.batch_size, False)
        state = convert_state(state, head_layouts(layout))

    def epoch(state: Any, operands: tuple[jax.Array, jax.Array]) -> tuple[Any, Totals]:
        index, epoch_rates = operands
        order = part.train[keys.epoch_order(seed, index, len(part.train))]
        epoch_plan = EpochPlan(order, setting.learning_rate * epoch_rates)
        steps = jnp.int32(rates.shape[1])
        return run_chunk(
            step,
            plan.batch_size,
            plan.batch_size,
            state,
            Totals.zero(),
            seed,
            epoch_plan,
            jnp.int32(0),
            steps,
            examples,
        )

    state, totals = lax.scan(epoch, state, (jnp.arange(plan.epochs), rates))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    predictions, losses = _predict(partial(apply, variables, train=False), plan.eval_batch_size, part, examples)
    loss = totals.loss[-1] / totals.count[-1]
    return state, Outcome(predictions, losses, loss, jnp.all(totals.bad_step < 0) & jnp.isfinite(loss))


def _predict(apply: Any, batch_size: int, part: Part, examples: Examples) -> tuple[jax.Array, jax.Array]:
    """The most probable class of each evaluated row, and its label's negative log-likelihood."""

    def body(index: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = index * batch_size
        rows = lax.dynamic_slice_in_dim(part.evaluated, start, batch_size)
        inputs, labels = (array.at[rows].get(mode="promise_in_bounds") for array in examples)
        logits = apply(inputs).astype(jnp.float32)
        classes = jnp.argmax(logits, -1).astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return tuple(  # type: ignore[return-value]
            lax.dynamic_update_slice_in_dim(all_rows, new, start, 0)
            for all_rows, new in zip(found, (classes, losses), strict=True)
        )

    shape = part.evaluated.shape
    batches = (part.count + batch_size - 1) // batch_size
    predictions, losses = lax.fori_loop(0, batches, body, (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)))
    counted = jnp.arange(len(predictions)) < part.count
    return jnp.where(counted, predictions, -1), jnp.where(counted, losses, 0.0)
