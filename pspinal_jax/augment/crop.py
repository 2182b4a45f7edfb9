"""Random crops with flips, for a whole batch in one gather: after a rotation, or of random area and aspect ratio.

Crops of random area and aspect ratio follow Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, section
6: the area is uniform between a minimum and the whole image, and the aspect ratio is between 3/4 and 4/3.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pspinal_jax.augment import warp

_MAX_TRIES = 10
"""As torchvision: a box that does not fit is drawn again, so often; after that it is cut to the image."""


class CropAugmentation(NamedTuple):
    """Strength of augmentation, with the defaults of the Caltech-101, STL-10, Fruits-360 and Bird-225 scripts.

    Attributes:
      degrees: angles are uniform in ± this.
      flip_probability: probability of swapping left and right, per image.
    """

    degrees: float = 15.0
    flip_probability: float = 0.5


PUBLISHED_CROP = CropAugmentation()


class View(NamedTuple):
    """The transformation of each image of a batch.

    Attributes:
      angles: float32 [N], degrees, counter-clockwise about the centre.
      corners: int32 [N, 2], (row, column) of the rotated image at which the crop begins.
      flips: bool [N], whether left and right of the crop are swapped.
    """

    angles: jax.Array
    corners: jax.Array
    flips: jax.Array


@functools.partial(jax.jit, static_argnames=("count", "height", "width", "size", "settings"))
def draw_view(
    key: jax.Array,
    count: int,
    height: int,
    width: int,
    size: int,
    settings: CropAugmentation = PUBLISHED_CROP,
) -> View:
    """The `View` of `count` images of `height` and `width`, cropped to `size`: a function of `key` and the rest.

    Raises:
      ValueError: if the crop is larger than the images, or a setting is out of its range.
    """
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size must be between 1 and the images' {height} x {width}, got {size}")
    warp.check_fraction("flip_probability", settings.flip_probability)
    angle_key, corner_key, flip_key = jax.random.split(key, 3)
    spare = jnp.array([height - size + 1, width - size + 1], jnp.int32)
    return View(
        angles=warp.draw_angles(angle_key, count, degrees=settings.degrees),
        corners=jax.random.randint(corner_key, (count, 2), 0, spare, jnp.int32),
        flips=jax.random.uniform(flip_key, (count,)) < settings.flip_probability,
    )


@functools.partial(jax.jit, static_argnames="size")
def apply_view(images: jax.Array, view: View, size: int) -> jax.Array:
    """Rotate (nearest, 0 outside), crop, flip. Only the crop's pixels are computed, each read once from `images`.

    Args:
      images: uint8 [N, H, W, C].
      view: see `View`.
      size: side S of the crop in pixels.

    Returns:
      uint8 [N, S, S, C].

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if an array has another shape.
    """
    warp.check_images(images)
    count, height, width, _ = images.shape
    warp.check_shape("angles", view.angles, count)
    warp.check_shape("corners", view.corners, count, 2)
    warp.check_shape("flips", view.flips, count)
    along = jnp.arange(size, dtype=jnp.int32)
    across = jnp.where(view.flips[:, None], size - 1 - along, along)
    x = warp.per_image(view.corners[:, 1]) + across[:, None, :]
    y = warp.per_image(view.corners[:, 0]) + along[None, :, None]
    return warp.sample_nearest(images, *warp.rotation_sources_at(view.angles, height, width, x, y))


@functools.partial(jax.jit, static_argnames=("size", "settings"))
def rotate_crop_flip(
    key: jax.Array, images: jax.Array, size: int, settings: CropAugmentation = PUBLISHED_CROP
) -> jax.Array:
    """Rotate, crop and flip images like torchvision's RandomRotation, RandomCrop and RandomHorizontalFlip.

    The same key gives the same images, in a plain call, under jit, and in a compiled loop.

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from pspinal_jax.augment import rotate_crop_flip
        >>> images = jnp.zeros((16, 230, 230, 3), jnp.uint8)
        >>> rotate_crop_flip(jax.random.key(0), images, size=224).shape
        (16, 224, 224, 3)

    Args:
      key: a JAX random key.
      images: uint8 [N, H, W, C]; the recipes resize to 230 x 230 without keeping the aspect ratio.
      size: side S of the crop in pixels; static under jit.
      settings: strength; static under jit.

    Returns:
      uint8 [N, S, S, C].

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if it has another shape or is smaller than the crop, or on a setting outside its range.
    """
    warp.check_images(images)
    count, height, width, _ = images.shape
    return apply_view(images, draw_view(key, count, height, width, size, settings), size)


class ResizedCrop(NamedTuple):
    """Settings of random resized crops.

    Attributes:
      min_area: smallest area of a crop, as a fraction of the image's; the largest is 1.
      aspect: largest aspect ratio; the logarithm of the ratio is uniform in ± the logarithm of this.
      flip_probability: probability of swapping left and right, per image.
    """

    min_area: float = 0.25
    aspect: float = 4 / 3
    flip_probability: float = 0.5


USUAL = ResizedCrop()


class Boxes(NamedTuple):
    """The crop of each image of a batch, in fractions of its height and width.

    Attributes:
      corners: float32 [N, 2], (row, column) at which the crop begins, 0 .. 1.
      sides: float32 [N, 2], (height, width) of the crop, above 0 and within the image.
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
    warp.check_fraction("flip_probability", settings.flip_probability)
    box_key, corner_key, flip_key = jax.random.split(key, 3)
    numbers = jax.random.uniform(box_key, (count * _MAX_TRIES * 2,)).reshape(count, _MAX_TRIES, 2)
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
    """Crop `images` to the boxes, resize to `size` (bilinear, without antialiasing) and flip.

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
    warp.check_images(images)
    count, height, width, _ = images.shape
    warp.check_shape("corners", boxes.corners, count, 2)
    warp.check_shape("sides", boxes.sides, count, 2)
    warp.check_shape("flips", boxes.flips, count)
    along = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    across = jnp.where(boxes.flips[:, None], 1 - along, along)
    y = warp.per_image(boxes.corners[:, 0]) + along[None, :, None] * warp.per_image(boxes.sides[:, 0])
    x = warp.per_image(boxes.corners[:, 1]) + across[:, None, :] * warp.per_image(boxes.sides[:, 1])
    return warp.sample_bilinear(images, *jnp.broadcast_arrays(x * width, y * height))


@functools.partial(jax.jit, static_argnames=("size", "settings"))
def resized_crop_flip(key: jax.Array, images: jax.Array, size: int, settings: ResizedCrop = USUAL) -> jax.Array:
    """Crop images to a random area and aspect ratio, resize to `size` and flip.

    Like torchvision's RandomResizedCrop and RandomHorizontalFlip, but from square images of one size and without
    antialiasing, so that crops larger than `size` are subsampled.

    Args:
      key: a JAX random key.
      images: uint8 [N, H, W, C].
      size: side S of the result in pixels; static under jit.
      settings: settings of the crop; static under jit.

    Returns:
      uint8 [N, S, S, C], a function of the arguments.

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if it has another shape, or on a setting outside its range.
    """
    warp.check_images(images)
    return apply_boxes(images, draw_boxes(key, len(images), settings), size)
