"""Optimisers and learning-rate schedules by their recipe.

The learning rate is an operand of the training step, so schedules run outside the compiled program: another peak or
another number of epochs needs no new compilation.
"""

from typing import Any

import jax
import numpy as np
import optax

from pspinal_jax.recipes.schema import OptimizerConfig


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The direction of descent of `config`, to be scaled by minus the learning rate; decay applies to kernels only."""
    if config.name == "sgd":
        return optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
    adam = optax.scale_by_adam(b1=config.momentum, nesterov=config.nesterov)
    if config.name == "adam":
        return adam
    return optax.chain(adam, optax.add_decayed_weights(config.weight_decay, mask=_kernels))


def learning_rates(config: OptimizerConfig, epoch: int, steps_per_epoch: int, epochs: int) -> np.ndarray:
    """Learning rates float32 [steps_per_epoch] of epoch `epoch`, counted from 0, in a run of `epochs`."""
    steps = np.arange(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    rates = _schedule(config, epochs * steps_per_epoch, steps_per_epoch)(steps)
    return np.broadcast_to(np.asarray(rates, np.float32), steps.shape)


def _schedule(config: OptimizerConfig, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
    peak = config.learning_rate
    if config.schedule == "constant":
        return optax.constant_schedule(peak)
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, total_steps)
    if config.schedule == "step":
        return optax.exponential_decay(peak, config.decay_epochs * steps_per_epoch, 0.1, staircase=True)
    warmup = max(1, round(config.warmup_fraction * total_steps))
    return optax.warmup_cosine_decay_schedule(peak / 25, peak, warmup, max(warmup + 1, total_steps))


def _kernels(params: Any) -> Any:
    """Which leaves are kernels: by name, for in some forms of a head's parameters biases are matrices too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in path[-1].key, params)
