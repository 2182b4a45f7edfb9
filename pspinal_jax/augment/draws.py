"""The random numbers of the augmentation: functions of a key and of the sizes, nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.augment.perspective import image_corners


@functools.partial(jax.jit, static_argnames=("count", "height", "width", "distortion", "probability"))
def draw_perspective(
    key: jax.Array, count: int, height: int, width: int, *, distortion: float = 0.5, probability: float = 0.5
) -> jax.Array:
    """Where the corners of `count` images go, as torchvision's RandomPerspective draws it.

    With `probability`, each corner moves inward by whole pixels, uniform in 0 .. int(distortion * (side // 2)) on
    either axis, all eight independent. Otherwise the corners stay.

    Args:
      key: a JAX random key.
      count: N, number of images.
      height: H of the images.
      width: W of the images.
      distortion: how far a corner may go, as a fraction of half the side, 0 to 1.
      probability: of an image being warped at all, 0 to 1.

    Returns:
      int32 [N, 4, 2], (x, y) of the upper left, upper right, lower right and lower left corner.

    Raises:
      ValueError: if `distortion` or `probability` is not between 0 and 1.
    """
    _check_fraction("distortion", distortion)
    _check_fraction("probability", probability)
    # All nine numbers of an image in one flat draw: with axes, or in two draws, it takes four times as long to compile.
    numbers = jax.random.uniform(key, (count * 9,), jnp.float32).reshape(count, 9)
    furthest = np.array([int(distortion * (side // 2)) for side in (width, height)], np.float32)
    # The largest number below 1 times a whole number rounds to less than that, so no corner goes too far.
    offsets = jnp.floor(numbers[:, 1:].reshape(count, 4, 2) * (furthest + 1)).astype(jnp.int32)
    inward = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.int32)
    moved = (numbers[:, 0] < probability)[:, None, None]
    return jnp.where(moved, offsets * inward, 0) + image_corners(height, width)


@functools.partial(jax.jit, static_argnames=("count", "degrees"))
def draw_angles(key: jax.Array, count: int, *, degrees: float = 10.0) -> jax.Array:
    """Angles of `count` images, float32 [N] uniform in ±`degrees`, as torchvision's RandomRotation draws them.

    Raises:
      ValueError: if `degrees` is negative.
    """
    if not degrees >= 0:
        raise ValueError(f"degrees must be at least 0, got {degrees!r}")
    return jax.random.uniform(key, (count,), jnp.float32, -degrees, degrees)


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
