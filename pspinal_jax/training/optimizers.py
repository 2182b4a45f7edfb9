"""Optimisers and learning-rate schedules by name.

The learning rate is an operand of the training step, so schedules run outside the compiled program: another peak or
another number of epochs needs no new compilation.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate changes over a run.

    Attributes:
      name: constant; cosine, down to 0; one_cycle, linear warm-up and then cosine to 0; step, times 0.1 every
        `decay_epochs`.
      peak: the largest learning rate.
      decay_epochs: epochs between two decays of 'step'.
      warmup_fraction: of the steps, for 'one_cycle'.
    """

    name: Literal["constant", "cosine", "one_cycle", "step"] = "constant"
    peak: float = 0.05
    decay_epochs: int = 7
    warmup_fraction: float = 0.3


def make_optimizer(
    name: Literal["sgd", "adam", "adamw"] = "sgd",
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float | jax.Array = 0.0,
) -> optax.GradientTransformation:
    """The direction of descent, to be scaled by minus the learning rate.

    The decay of adamw, a number or a scalar array, applies to kernels only.
    """
    if name == "sgd":
        return optax.trace(momentum, nesterov) if momentum else optax.identity()
    adam = optax.scale_by_adam(b1=momentum, nesterov=nesterov)
    return adam if name == "adam" else optax.chain(adam, optax.add_decayed_weights(weight_decay, mask=_kernels))


def learning_rates(schedule: Schedule, epoch: int, steps_per_epoch: int, epochs: int) -> np.ndarray:
    """Learning rates float32 [steps_per_epoch] of epoch `epoch`, counted from 0, in a run of `epochs`."""
    steps = np.arange(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    rates = _optax_schedule(schedule, epochs * steps_per_epoch, steps_per_epoch)(steps)
    return np.broadcast_to(np.asarray(rates, np.float32), steps.shape)


def _optax_schedule(schedule: Schedule, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
    peak = schedule.peak
    if schedule.name == "constant":
        return optax.constant_schedule(peak)
    if schedule.name == "cosine":
        return optax.cosine_decay_schedule(peak, total_steps)
    if schedule.name == "step":
        return optax.exponential_decay(peak, schedule.decay_epochs * steps_per_epoch, 0.1, staircase=True)
    warmup = max(1, round(schedule.warmup_fraction * total_steps))
    return optax.warmup_cosine_decay_schedule(peak / 25, peak, warmup, max(warmup + 1, total_steps))


def _kernels(params: Any) -> Any:
    """Which leaves are kernels: by name, for in some layouts of a head's parameters biases are matrices too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in path[-1].key, params)
