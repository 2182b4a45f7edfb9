"""Optimisers and learning-rate schedules by name.

The learning rate is an operand of the training step, so schedules run outside the compiled program: another peak or
another number of epochs needs no new compilation.
"""

import dataclasses
from functools import partial
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
      warmup_epochs: for the others: epochs of a linear warm-up from peak / 25, before the schedule, which then has the
        remaining steps.
    """

    name: Literal["constant", "cosine", "one_cycle", "step"] = "constant"
    peak: float = 0.05
    decay_epochs: int = 7
    warmup_fraction: float = 0.3
    warmup_epochs: float = 0.0


def make_optimizer(
    name: Literal["sgd", "adam", "adamw"] = "sgd",
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float | jax.Array = 0.0,
    gradient_clip: float = 0.0,
    backbone_rate: float = 1.0,
) -> optax.GradientTransformation:
    """The direction of descent, to be scaled by minus the learning rate.

    Args:
      name: of the optimiser.
      momentum: of sgd; decay of the first moment of adam and adamw.
      nesterov: whether momentum looks ahead.
      weight_decay: of adamw, a number or a scalar array; applies to kernels only.
      gradient_clip: largest global L2 norm of the gradient; 0 for no limit.
      backbone_rate: factor of the learning rate of what stands under ``backbone``, its weight decay included.
    """
    direction = optax.scale_by_adam(b1=momentum, nesterov=nesterov)
    if name == "sgd":
        direction = optax.trace(momentum, nesterov) if momentum else optax.identity()
    elif name == "adamw":
        direction = optax.chain(direction, optax.add_decayed_weights(weight_decay, mask=_kernels))
    before = [optax.clip_by_global_norm(gradient_clip)] if gradient_clip else []
    after = [optax.stateless(partial(_scale_backbone, backbone_rate))] if backbone_rate != 1.0 else []
    return optax.chain(*before, direction, *after) if before or after else direction


def _scale_backbone(rate: float, updates: Any, params: Any) -> Any:
    del params
    return {
        name: jax.tree.map(lambda u: rate * u, tree) if name == "backbone" else tree for name, tree in updates.items()
    }


def learning_rates(schedule: Schedule, epoch: int, steps_per_epoch: int, epochs: int) -> np.ndarray:
    """Learning rates float32 [steps_per_epoch] of epoch `epoch`, counted from 0, in a run of `epochs`."""
    steps = np.arange(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    # Optax computes with Python's numbers, on the host or where it traces: what strict settings of JAX are not about.
    with jax.numpy_dtype_promotion("standard"), jax.transfer_guard("allow"):
        rates = np.asarray(_optax_schedule(schedule, epochs * steps_per_epoch, steps_per_epoch)(steps), np.float32)
    return np.broadcast_to(rates, steps.shape)


def _optax_schedule(schedule: Schedule, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if warmup and schedule.name != "one_cycle":
        rest = dataclasses.replace(schedule, warmup_epochs=0.0)
        rising = optax.linear_schedule(schedule.peak / 25, schedule.peak, warmup)
        after = _optax_schedule(rest, total_steps - warmup, steps_per_epoch)
        return optax.join_schedules([rising, after], [warmup])
    peak = schedule.peak
    if schedule.name == "constant":
        return optax.constant_schedule(peak)
    if schedule.name == "cosine":
        return optax.cosine_decay_schedule(peak, max(1, total_steps))  # none may be left after the warm-up
    if schedule.name == "step":
        return optax.exponential_decay(peak, schedule.decay_epochs * steps_per_epoch, 0.1, staircase=True)
    warmup = max(1, round(schedule.warmup_fraction * total_steps))
    return optax.warmup_cosine_decay_schedule(peak / 25, peak, warmup, max(warmup + 1, total_steps))


def _kernels(params: Any) -> Any:
    """Which leaves are kernels: by name, for in some layouts of a head's parameters biases are matrices too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in path[-1].key, params)
