"""Rotation about the centre, in Pillow's fixed-point arithmetic: whole numbers, so the same pixels everywhere."""

import math

import jax
import jax.numpy as jnp

from pspinal_jax.augment.sampling import check_images, per_image, sample_nearest

_FRACTION_BITS = 16


@jax.jit
def rotate(images: jax.Array, angles: jax.Array) -> jax.Array:
    """Images turned counter-clockwise about their centre, each pixel the nearest one of the input, 0 outside.

    The arithmetic is that of Pillow's ``rotate(angle, NEAREST)``, which torchvision's RandomRotation calls.

    Args:
      images: uint8 [N, H, W, C].
      angles: float32 [N], degrees.

    Returns:
      uint8 [N, H, W, C].

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if either has another shape.
    """
    check_images(images)
    check_angles(angles, images.shape[0])
    return sample_nearest(images, *rotation_sources(angles, images.shape[1], images.shape[2]))


def rotation_sources(angles: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Which input pixel each output pixel shows; see `rotation_sources_at`. Returns int32 [N, H, W] twice."""
    x = jnp.arange(width, dtype=jnp.int32)[None, None, :]
    y = jnp.arange(height, dtype=jnp.int32)[None, :, None]
    return rotation_sources_at(angles, height, width, x, y)


def rotation_sources_at(
    angles: jax.Array, height: int, width: int, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which input pixel the output pixels at column `x` and row `y` show.

    Args:
      angles: float32 [N], degrees.
      height: H of the images.
      width: W of the images.
      x: int32, broadcastable to [N, R, S].
      y: int32, likewise.

    Returns:
      (rows, columns), each int32 [N, R, S]; outside the image where the rotation brings in nothing.
    """
    radians = angles * (-math.pi / 180)
    sine = jnp.sin(radians)
    # 1 - cos, from the half angle: the cosine itself has too few digits for 16 fractional bits.
    versine = 2 * jnp.square(jnp.sin(radians / 2))
    right, down = (width - 1) / 2, (height - 1) / 2
    step = (1 << _FRACTION_BITS) - _fixed(versine)
    shear_x, shear_y = _fixed(sine), _fixed(-sine)
    first_x = _fixed(0.5 + right * versine - down * sine)
    first_y = _fixed(0.5 + down * versine + right * sine)
    columns = (per_image(first_x) + per_image(step) * x + per_image(shear_x) * y) >> _FRACTION_BITS
    rows = (per_image(first_y) + per_image(shear_y) * x + per_image(step) * y) >> _FRACTION_BITS
    return rows, columns


def check_angles(angles: jax.Array, count: int) -> None:
    """Raise ValueError unless `angles` is [count]."""
    if angles.shape != (count,):
        raise ValueError(f"angles must have shape [{count}], one per image, got {angles.shape}")


def _fixed(values: jax.Array) -> jax.Array:
    """`values` in units of 2**-16, rounded half up as Pillow does, int32."""
    return jnp.floor(values * (1 << _FRACTION_BITS) + 0.5).astype(jnp.int32)
