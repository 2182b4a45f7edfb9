"""The augmentation of the 28x28 recipes: perspective, then rotation, of a whole batch in one pass over its pixels."""

import functools
from typing import NamedTuple

import jax

from pspinal_jax.augment.warp import (
    check_images,
    check_shape,
    draw_angles,
    draw_perspective,
    perspective_coefficients,
    perspective_positions,
    rotation_sources,
    sample_bilinear,
    within,
)


class Augmentation(NamedTuple):
    """How strongly to augment; the defaults, `PUBLISHED`, are those of the KMNIST, QMNIST and EMNIST scripts.

    Attributes:
      distortion: see `draw_perspective`.
      probability: of a perspective warp, per image.
      degrees: angles are uniform in ± this.
    """

    distortion: float = 0.5
    probability: float = 0.5
    degrees: float = 10.0


PUBLISHED = Augmentation()


class Warp(NamedTuple):
    """What happens to each image of a batch: `corners` int32 [N, 4, 2] and `angles` float32 [N], degrees."""

    corners: jax.Array
    angles: jax.Array


@functools.partial(jax.jit, static_argnames=("count", "height", "width", "settings"))
def draw_warp(key: jax.Array, count: int, height: int, width: int, settings: Augmentation = PUBLISHED) -> Warp:
    """The `Warp` of `count` images of `height` and `width`, a function of `key` and the other arguments.

    Raises:
      ValueError: on a setting outside its range.
    """
    perspective_key, angle_key = jax.random.split(key)
    corners = draw_perspective(
        perspective_key, count, height, width, distortion=settings.distortion, probability=settings.probability
    )
    return Warp(corners, draw_angles(angle_key, count, degrees=settings.degrees))


@jax.jit
def apply_warp(images: jax.Array, warp: Warp) -> jax.Array:
    """Perspective, then rotation: what ``rotate(warp_perspective(images, ..), ..)`` gives, at two thirds of the cost.

    The rotation only copies pixels. So each output pixel asks it for the pixel to copy, and computes that one pixel of
    the perspective image, truncation included, instead of looking it up. The images are read once and nothing
    is stored in between.

    Args:
      images: uint8 [N, H, W, C].
      warp: corners [N, 4, 2] and angles [N].

    Returns:
      uint8 [N, H, W, C].

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if an array has another shape.
    """
    check_images(images)
    count, height, width, _ = images.shape
    check_shape("angles", warp.angles, count)
    check_shape("corners", warp.corners, count, 4, 2)
    rows, columns = rotation_sources(warp.angles, height, width)
    coefficients = perspective_coefficients(warp.corners, height, width)
    x, y = perspective_positions(coefficients, columns, rows)
    return sample_bilinear(images, x, y, visible=within(rows, columns, height, width))


@functools.partial(jax.jit, static_argnames="settings")
def augment(key: jax.Array, images: jax.Array, settings: Augmentation = PUBLISHED) -> jax.Array:
    """Images augmented as torchvision's RandomPerspective and RandomRotation do it on Pillow images.

    A function of its arguments: the same key gives the same images, in a plain call, under jit or in a compiled loop.

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from pspinal_jax.augment import augment
        >>> images = jnp.zeros((64, 28, 28, 1), jnp.uint8)
        >>> augment(jax.random.key(0), images).shape
        (64, 28, 28, 1)

    Args:
      key: a JAX random key.
      images: uint8 [N, H, W, C].
      settings: how strongly; static under jit.

    Returns:
      uint8 [N, H, W, C].

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if it has another shape, or on a setting outside its range.
    """
    check_images(images)
    count, height, width, _ = images.shape
    return apply_warp(images, draw_warp(key, count, height, width, settings))
