"""Reading images at computed positions, as Pillow's filters do: bilinear, truncated to uint8, and nearest."""

from typing import Any

import jax
import jax.numpy as jnp

MAX_SIDE = 8192
"""Longest side: the rotation's fixed-point positions, 16 bits of them fractional, fit an int32 up to there."""


def check_images(images: Any) -> None:
    """Raise unless `images` is a uint8 array [N, H, W, C] whose sides and number of entries an int32 can address.

    Raises:
      TypeError: if it is not a uint8 array.
      ValueError: if it has not four axes, an empty one, a side above `MAX_SIDE`, or 2**31 entries or more.
    """
    # Not chex: its AssertionError names neither what was expected nor what to do.
    if getattr(images, "dtype", None) != jnp.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images must be a uint8 array, got {kind}; augment before converting to float")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must have shape [N, H, W, C], none of them 0, got {images.shape}")
    if max(images.shape[1:3]) > MAX_SIDE:
        raise ValueError(f"images must be at most {MAX_SIDE} pixels high and wide, got {images.shape}")
    if images.size >= 2**31:
        raise ValueError(f"images must have fewer than 2**31 entries, got {images.shape}; augment smaller batches")


def per_image(values: jax.Array) -> jax.Array:
    """`values` [N] as [N, 1, 1], to meet rows and columns."""
    return values[:, None, None]


def gather(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Pixels [N, R, S, C] of `images` [N, H, W, C] at int32 `rows` and `columns` [N, R, S], all within the image."""
    count, height, width, channels = images.shape
    first = per_image(jnp.arange(count, dtype=jnp.int32)) * (height * width)
    pixels = (first + rows * width + columns)[..., None] * channels + jnp.arange(channels, dtype=jnp.int32)
    # One flat index per entry: XLA's CPU compiler makes one vectorised loop of the index arithmetic and the
    # reading, which it does not with an index per axis (docs/notes_augmentation.md).
    return images.reshape(-1).at[pixels].get(mode="promise_in_bounds")


def sample_bilinear(images: jax.Array, x: jax.Array, y: jax.Array, visible: jax.Array | None = None) -> jax.Array:
    """`images` [N, H, W, C] read at continuous positions, 0 outside; pixel (i, j) has its centre at (j + .5, i + .5).

    Neighbours beyond an edge repeat the edge, and the result is truncated, not rounded: so does Pillow.

    Args:
      images: uint8 [N, H, W, C].
      x: float32 [N, R, S], position across.
      y: float32 [N, R, S], position down.
      visible: bool [N, R, S], False where the result is 0 whatever the position; None for True everywhere.

    Returns:
      uint8 [N, R, S, C].
    """
    height, width = images.shape[1:3]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if visible is not None:
        inside &= visible
    x, y = x - 0.5, y - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    right_weight, lower_weight = (x - left)[..., None], (y - top)[..., None]
    column, row = left.astype(jnp.int32), top.astype(jnp.int32)
    # Clipping also takes in positions outside, whose value is dropped: the reading itself checks no bounds.
    columns = jnp.clip(column, 0, width - 1), jnp.clip(column + 1, 0, width - 1)
    rows = jnp.clip(row, 0, height - 1), jnp.clip(row + 1, 0, height - 1)

    def line(index: int) -> jax.Array:
        start, end = (gather(images, rows[index], at).astype(jnp.float32) for at in columns)
        return start + (end - start) * right_weight

    upper, lower = line(0), line(1)
    values = upper + (lower - upper) * lower_weight
    return jnp.where(inside[..., None], values, 0.0).astype(jnp.uint8)


def sample_nearest(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Pixels [N, R, S, C] of `images` [N, H, W, C] at int32 `rows` and `columns` [N, R, S], 0 outside the image."""
    height, width = images.shape[1:3]
    inside = within(rows, columns, height, width)
    pixels = gather(images, jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1))
    return jnp.where(inside[..., None], pixels, jnp.zeros((), images.dtype))


def within(rows: jax.Array, columns: jax.Array, height: int, width: int) -> jax.Array:
    """Whether pixel indices lie in an image of `height` and `width`."""
    return (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
