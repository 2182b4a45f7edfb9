"""The augmentation of the colour recipes: rotation, random crop and flip of a whole batch in one reading."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pspinal_jax.augment.draws import draw_angles
from pspinal_jax.augment.rotation import check_angles, rotation_sources_at
from pspinal_jax.augment.sampling import check_images, per_image, sample_nearest


class CropAugmentation(NamedTuple):
    """How strongly to augment; the defaults are those of the Caltech-101, STL-10, Fruits-360 and Bird-225 scripts.

    Attributes:
      degrees: angles are uniform in ± this.
      flip_probability: of left and right being swapped, per image.
    """

    degrees: float = 15.0
    flip_probability: float = 0.5


PUBLISHED_CROP = CropAugmentation()


class View(NamedTuple):
    """What happens to each image of a batch.

    Attributes:
      angles: float32 [N], degrees, counter-clockwise about the centre.
      corners: int32 [N, 2], (row, column) of the rotated image where the crop begins.
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
    if not 0.0 <= settings.flip_probability <= 1.0:
        raise ValueError(f"flip_probability must be between 0 and 1, got {settings.flip_probability!r}")
    angle_key, corner_key, flip_key = jax.random.split(key, 3)
    spare = jnp.array([height - size + 1, width - size + 1], jnp.int32)
    return View(
        angles=draw_angles(angle_key, count, degrees=settings.degrees),
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
    check_images(images)
    count, height, width, _ = images.shape
    check_angles(view.angles, count)
    if view.corners.shape != (count, 2) or view.flips.shape != (count,):
        raise ValueError(
            f"corners must have shape [{count}, 2] and flips [{count}], one per image, got {view.corners.shape} and "
            f"{view.flips.shape}"
        )
    along = jnp.arange(size, dtype=jnp.int32)
    across = jnp.where(view.flips[:, None], size - 1 - along, along)
    x = per_image(view.corners[:, 1]) + across[:, None, :]
    y = per_image(view.corners[:, 0]) + along[None, :, None]
    return sample_nearest(images, *rotation_sources_at(view.angles, height, width, x, y))


@functools.partial(jax.jit, static_argnames=("size", "settings"))
def rotate_crop_flip(
    key: jax.Array, images: jax.Array, size: int, settings: CropAugmentation = PUBLISHED_CROP
) -> jax.Array:
    """Images rotated, cropped and flipped as torchvision's RandomRotation, RandomCrop and RandomHorizontalFlip do.

    A function of its arguments: the same key gives the same images, in a plain call, under jit or in a compiled loop.

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from pspinal_jax.augment import rotate_crop_flip
        >>> images = jnp.zeros((16, 230, 230, 3), jnp.uint8)
        >>> rotate_crop_flip(jax.random.key(0), images, size=224).shape
        (16, 224, 224, 3)

    Args:
      key: a JAX random key.
      images: uint8 [N, H, W, C]; the recipes resize to 230 x 230, without keeping the aspect.
      size: side S of the crop in pixels; static under jit.
      settings: how strongly; static under jit.

    Returns:
      uint8 [N, S, S, C].

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if it has another shape or is smaller than the crop, or on a setting outside its range.
    """
    check_images(images)
    count, height, width, _ = images.shape
    return apply_view(images, draw_view(key, count, height, width, size, settings), size)
