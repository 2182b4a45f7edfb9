"""Inverted dropout whose mask depends on nothing but the key, the stream and the shape.

The mask's bits are Threefry-2x32 with 20 rounds, the function behind jax.random's default keys (J. Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), all of a mask in one pass. jax.random.bits computes a block of
two words for each word it returns, on CPU in a loop of small kernels; a mask by that way costs four times as much.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LEVELS = 1 << 16
Rate = float | jax.Array
"""A probability below 1: a number, or a scalar array, with which programs for several rates are one."""
FEATURES_STREAM = 0
"""Stream of the mask on the features; the mask on the whole input of layer i (or output L + 1) is stream i's."""


def drops(rate: Rate) -> bool:
    """Whether dropout with `rate` draws a mask: an array always does, as its value may not be known yet."""
    return isinstance(rate, jax.Array) or rate > 0.0


def dropout_scale(
    key: jax.Array, stream: jax.Array | int, rate: Rate, shape: tuple[int, int], dtype: jnp.dtype
) -> jax.Array:
    """What dropout multiplies its input with: 0 with probability `rate`, else 1 / (1 - rate).

    Four 16-bit draws come from every block of the generator. The rate in force is therefore the nearest multiple
    of 2**-16; the scale uses that same value, so the expectation is exact.

    Args:
      key: a JAX random key.
      stream: which of the key's masks.
      rate: probability of dropping an entry, 0 <= rate < 1; an array gives the mask that the number it holds gives.
      shape: (rows, columns) of the mask.
      dtype: dtype of the result.

    Returns:
      Array of `shape` and `dtype`.
    """
    rows, columns = shape
    blocks = math.ceil(columns / 4)
    words = random_words(key, stream, rows, 2 * blocks)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(rows, 4 * blocks)[:, :columns]
    threshold: int | jax.Array
    if isinstance(rate, jax.Array):
        level = jnp.clip(jnp.round(rate.astype(jnp.float32) * _LEVELS), 0, _LEVELS - 1)
        threshold, scale = level.astype(jnp.uint16), (_LEVELS / (_LEVELS - level)).astype(dtype)
    else:
        threshold = min(round(rate * _LEVELS), _LEVELS - 1)
        scale = jnp.asarray(_LEVELS / (_LEVELS - threshold), dtype)
    return jnp.where(draws >= threshold, scale, jnp.zeros((), dtype))


def dropout(key: jax.Array | None, rate: Rate, inputs: jax.Array) -> jax.Array:
    """Inverted dropout of `inputs` [N, D]; the identity where `key` is None or `rate` is 0."""
    if key is None or not drops(rate):
        return inputs
    rows, columns = inputs.shape
    return inputs * dropout_scale(key, FEATURES_STREAM, rate, (rows, columns), inputs.dtype)


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def threefry_2x32(key: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The block cipher: two uint32 words from two uint32 words.

    Args:
      key: uint32 [2].
      first: uint32 array, half of the counters.
      second: uint32 array of that shape, the other half.

    Returns:
      Two uint32 arrays of that shape.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    first, second = first + keys[0], second + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            first = first + second
            second = (second << np.uint32(rotation)) | (second >> np.uint32(32 - rotation))
            second = second ^ first
        first = first + keys[(group + 1) % 3]
        second = second + keys[(group + 2) % 3] + np.uint32(group + 1)
    return first, second


def random_words(key: jax.Array, stream: jax.Array | int, rows: int, columns: int) -> jax.Array:
    """Random uint32 words [rows, columns], a function of nothing but the arguments.

    Args:
      key: a JAX random key of any kind.
      stream: uint32, which of the key's independent streams.
      rows: number of rows.
      columns: number of columns, even.
    """
    data = jax.random.key_data(key)
    if data.shape != (2,):  # a key of another generator than Threefry
        data = jax.random.bits(key, (2,), jnp.uint32)
    blocks = columns // 2
    row, column = (lax.broadcasted_iota(jnp.uint32, (rows, blocks), axis) for axis in (0, 1))
    counter = row * np.uint32(blocks) + column
    stream = jnp.asarray(stream).astype(jnp.uint32)
    return jnp.concatenate(threefry_2x32(data, counter, jnp.broadcast_to(stream, counter.shape)), axis=1)
