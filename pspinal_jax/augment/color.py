"""Brightness, contrast and saturation of a batch, changed on the device like torchvision's ColorJitter."""

import functools

import jax
import jax.numpy as jnp

from pspinal_jax.augment.warp import check_fraction, check_images, check_shape

_LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue (ITU-R BT.601), as Pillow's and torchvision's grey."""


@functools.partial(jax.jit, static_argnames=("count", "strength"))
def draw_color(key: jax.Array, count: int, strength: float) -> jax.Array:
    """Factors of brightness, contrast and saturation, float32 [count, 3] uniform in 1 ± `strength`.

    Raises:
      ValueError: if `strength` is not between 0 and 1.
    """
    check_fraction("strength", strength)
    return jax.random.uniform(key, (count, 3), jnp.float32, 1 - strength, 1 + strength)


@jax.jit
def adjust_color(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Change brightness, contrast and saturation, in this order, with clipping after each and rounding at the end.

    brightness: f x; contrast: f x + (1 - f) m, where m is the image's mean grey; saturation: f x + (1 - f) g, where g
    is the pixel's grey. torchvision applies the three in random order and truncates after each.

    Args:
      images: uint8 [N, H, W, C], C 1 (saturation changes nothing) or 3.
      factors: float32 [N, 3], see `draw_color`.

    Returns:
      uint8 [N, H, W, C].

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if an array has another shape.
    """
    check_images(images)
    if images.shape[3] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {images.shape}")
    check_shape("factors", factors, len(images), 3)
    brightness, contrast, saturation = (factors[:, index, None, None, None] for index in range(3))

    def grey(values: jax.Array) -> jax.Array:
        if values.shape[3] == 1:
            return values
        return sum(weight * values[..., channel, None] for channel, weight in enumerate(_LUMA))  # type: ignore[return-value]

    def between(factor: jax.Array, values: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.clip(other + factor * (values - other), 0, 255)

    values = jnp.clip(brightness * images.astype(jnp.float32), 0, 255)
    values = between(contrast, values, grey(values).mean((1, 2, 3), keepdims=True))
    values = between(saturation, values, grey(values))
    return jnp.rint(values).astype(jnp.uint8)


def color_jitter(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """`adjust_color` with factors from `draw_color`; raises like they do."""
    check_images(images)
    return adjust_color(images, draw_color(key, len(images), strength))
