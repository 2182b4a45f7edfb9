"""Batch norm with torch's conventions, as a function of arrays.

torch keeps the UNBIASED variance (factor n / (n - 1)) in its running statistics and normalises a training
batch with the biased one; flax.linen.BatchNorm keeps the biased one. Checkpoints and results of the published
scripts follow torch.
"""

import math

import jax
import jax.numpy as jnp

EPSILON = 1e-5
MOMENTUM = 0.9
"""Weight of the old running average (torch writes the same as momentum 0.1)."""


def statistics_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that means and variances are kept in: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def batch_statistics(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of `inputs` [..., W] over all axes but the last, each [W] and float32 or wider."""
    inputs = inputs.astype(statistics_dtype(inputs.dtype))
    axes = tuple(range(inputs.ndim - 1))
    mean = jnp.mean(inputs, axes)
    # Two passes: E[x^2] - E[x]^2 loses digits, and XLA's CPU code for it is the slower of the two.
    variance = jnp.mean(jnp.square(inputs - mean), axes)
    return mean, variance


def normalize(inputs: jax.Array, mean: jax.Array, variance: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """(inputs - mean) / sqrt(variance + 1e-5) * scale + bias, computed in float32 or wider, in `inputs`' dtype."""
    dtype = statistics_dtype(inputs.dtype)
    factor = jax.lax.rsqrt(variance.astype(dtype) + EPSILON) * scale.astype(dtype)
    shifted = (inputs.astype(dtype) - mean.astype(dtype)) * factor + bias.astype(dtype)
    return shifted.astype(inputs.dtype)


def update_running(
    running_mean: jax.Array, running_var: jax.Array, mean: jax.Array, variance: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """New running mean and variance after a batch of `count` rows with that mean and biased variance."""
    unbiased = variance * (count / (count - 1)) if count > 1 else variance
    new_mean = MOMENTUM * running_mean + (1 - MOMENTUM) * mean.astype(running_mean.dtype)
    new_var = MOMENTUM * running_var + (1 - MOMENTUM) * unbiased.astype(running_var.dtype)
    return new_mean, new_var


def check_rows(shape: tuple[int, ...]) -> int:
    """The number of rows of a training batch of `shape`; ValueError where batch norm cannot learn from it."""
    rows = math.prod(shape[:-1])
    if rows < 2:
        raise ValueError(
            f"batch norm in training needs at least 2 rows, got features of shape {shape}; "
            "use a larger batch or call the head with train=False"
        )
    return rows
