"""Inverted dropout whose mask depends on nothing but the key, the stream and the shape."""

import math

import jax
import jax.numpy as jnp

from pspinal_jax.heads.random_bits import random_words

_LEVELS = 1 << 16
FEATURES_STREAM = 0
"""Stream of the mask on the features; the mask on the whole input of layer i (or output L + 1) is stream i's."""


def keep_scale(
    key: jax.Array, stream: jax.Array | int, rate: float, shape: tuple[int, int], dtype: jnp.dtype
) -> jax.Array:
    """What dropout multiplies its input with: 0 with probability `rate`, else 1 / (1 - rate).

    Four 16-bit draws are cut from every block of the generator. The rate in force is therefore the nearest multiple
    of 2**-16; the scale uses that same value, so the expectation is exact.

    Args:
      key: a JAX random key.
      stream: which of the key's masks.
      rate: probability of dropping an entry, 0 <= rate < 1.
      shape: (rows, columns) of the mask.
      dtype: dtype of the result.

    Returns:
      Array of `shape` and `dtype`.
    """
    threshold = min(round(rate * _LEVELS), _LEVELS - 1)
    rows, columns = shape
    blocks = math.ceil(columns / 4)
    words = random_words(key, stream, rows, 2 * blocks)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(rows, 4 * blocks)[:, :columns]
    scale = jnp.asarray(_LEVELS / (_LEVELS - threshold), dtype)
    return jnp.where(draws >= threshold, scale, jnp.zeros((), dtype))


def dropout(key: jax.Array | None, rate: float, inputs: jax.Array) -> jax.Array:
    """Inverted dropout of `inputs` [N, D]; the identity where `key` is None or `rate` is 0."""
    if key is None or rate == 0.0:
        return inputs
    rows, columns = inputs.shape
    return inputs * keep_scale(key, FEATURES_STREAM, rate, (rows, columns), inputs.dtype)
