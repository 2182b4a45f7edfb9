"""Crops of random area and aspect, resized and flipped: "Inception-style" training of photographs, on the device.

Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, section 6: an area evenly distributed between a
least part and the whole of the image, with an aspect between 3/4 and 4/3.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pspinal_jax.augment.sampling import check_images, per_image, sample_bilinear

_TRIES = 10
"""As torchvision: a box that does not fit is drawn again, so often; after that it is cut to the image."""


class ResizedCrop(NamedTuple):
    """How to crop.

    Attributes:
      min_area: smallest area of a crop, as a part of the image's; the largest is 1.
      aspect: largest ratio of the sides; its logarithm is uniform in ± this one's.
      flip_probability: of left and right being swapped, per image.
    """

    min_area: float = 0.25
    aspect: float = 4 / 3
    flip_probability: float = 0.5


USUAL = ResizedCrop()


class Boxes(NamedTuple):
    """What happens to each image of a batch, in parts of its height and width.

    Attributes:
      corners: float32 [N, 2], (row, column) where the crop begins, 0 .. 1.
      sides: float32 [N, 2], (height, width) of the crop, above 0; within the image.
      flips: bool [N], whether left and right of the crop are swapped.
    """

    corners: jax.Array
    sides: jax.Array
    flips: jax.Array


@functools.partial(jax.jit, static_argnames=("count", "settings"))
def draw_boxes(key: jax.Array, count: int, settings: ResizedCrop = USUAL) -> Boxes:
    """The `Boxes` of `count` square images, a function of `key` and the rest.

    Raises:
      ValueError: on a setting outside its range.
    """
    if not 0.0 < settings.min_area <= 1.0:
        raise ValueError(f"min_area must be above 0 and at most 1, got {settings.min_area!r}")
    if not settings.aspect >= 1.0:
        raise ValueError(f"aspect must be at least 1, got {settings.aspect!r}")
    if not 0.0 <= settings.flip_probability <= 1.0:
        raise ValueError(f"flip_probability must be between 0 and 1, got {settings.flip_probability!r}")
    box_key, corner_key, flip_key = jax.random.split(key, 3)
    numbers = jax.random.uniform(box_key, (count * _TRIES * 2,)).reshape(count, _TRIES, 2)
    area = settings.min_area + (1 - settings.min_area) * numbers[..., 0]
    ratio = jnp.exp((2 * numbers[..., 1] - 1) * math.log(settings.aspect))
    tried = jnp.sqrt(jnp.stack([area / ratio, area * ratio], -1))
    first = jnp.argmax(tried.max(-1) <= 1.0, axis=1)  # the first that fits; the first of all where none does
    sides = jnp.minimum(jnp.take_along_axis(tried, first[:, None, None], axis=1)[:, 0], 1.0)
    return Boxes(
        corners=jax.random.uniform(corner_key, (count, 2)) * (1 - sides),
        sides=sides,
        flips=jax.random.uniform(flip_key, (count,)) < settings.flip_probability,
    )


@functools.partial(jax.jit, static_argnames="size")
def apply_boxes(images: jax.Array, boxes: Boxes, size: int) -> jax.Array:
    """The boxes of `images`, each resized to `size` (bilinear, without antialiasing) and flipped.

    Args:
      images: uint8 [N, H, W, C].
      boxes: see `Boxes`.
      size: side S in pixels.

    Returns:
      uint8 [N, S, S, C].

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if an array has another shape.
    """
    check_images(images)
    count, height, width, _ = images.shape
    if boxes.corners.shape != (count, 2) or boxes.sides.shape != (count, 2) or boxes.flips.shape != (count,):
        raise ValueError(
            f"corners and sides must have shape [{count}, 2] and flips [{count}], one per image, got "
            f"{boxes.corners.shape}, {boxes.sides.shape} and {boxes.flips.shape}"
        )
    along = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    across = jnp.where(boxes.flips[:, None], 1 - along, along)
    y = per_image(boxes.corners[:, 0]) + along[None, :, None] * per_image(boxes.sides[:, 0])
    x = per_image(boxes.corners[:, 1]) + across[:, None, :] * per_image(boxes.sides[:, 1])
    return sample_bilinear(images, *jnp.broadcast_arrays(x * width, y * height))


@functools.partial(jax.jit, static_argnames=("size", "settings"))
def resized_crop_flip(key: jax.Array, images: jax.Array, size: int, settings: ResizedCrop = USUAL) -> jax.Array:
    """Images cropped to a random area and aspect, resized to `size`, flipped.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip, but from images that are squares of one size already,
    and without antialiasing: a crop larger than `size` is read at every few pixels.

    Args:
      key: a JAX random key.
      images: uint8 [N, H, W, C].
      size: side S of the result in pixels; static under jit.
      settings: how strongly; static under jit.

    Returns:
      uint8 [N, S, S, C], a function of the arguments.

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if it has another shape, or on a setting outside its range.
    """
    check_images(images)
    return apply_boxes(images, draw_boxes(key, len(images), settings), size)
