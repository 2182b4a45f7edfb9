"""Inverted dropout whose mask depends on nothing but the key and the shape."""

import math

import jax
import jax.numpy as jnp

_LEVELS = 1 << 16


def keep_scale(key: jax.Array, rate: float, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """What dropout multiplies its input with: 0 with probability `rate`, else 1 / (1 - rate).

    Two 16-bit draws are cut from every 32 random bits, which halves the cost of the random numbers. The
    rate in force is therefore the nearest multiple of 2**-16; the scale uses that same value, so the
    expectation is exact.

    Args:
      key: a JAX random key.
      rate: probability of dropping an entry, 0 <= rate < 1.
      shape: (rows, columns) of the mask.
      dtype: dtype of the result.

    Returns:
      Array of `shape` and `dtype`.
    """
    threshold = min(round(rate * _LEVELS), _LEVELS - 1)
    rows, columns = shape
    pairs = math.ceil(columns / 2)
    words = jax.random.bits(key, (rows, pairs), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(rows, 2 * pairs)[:, :columns]
    scale = jnp.asarray(_LEVELS / (_LEVELS - threshold), dtype)
    return jnp.where(draws >= threshold, scale, jnp.zeros((), dtype))


def dropout(key: jax.Array | None, rate: float, inputs: jax.Array) -> jax.Array:
    """Inverted dropout of `inputs` [N, D]; the identity where `key` is None or `rate` is 0."""
    if key is None or rate == 0.0:
        return inputs
    rows, columns = inputs.shape
    return inputs * keep_scale(key, rate, (rows, columns), inputs.dtype)
