"""Perspective and rotation as Pillow computes them: their random numbers, where each pixel comes from, the reading.

`augment`, the augmentation of the 28x28 recipes, does both to a whole batch in one pass over its pixels.

Random numbers are functions of a key and of the sizes, nothing else. Images are read bilinearly, truncated to uint8, or
at the nearest pixel; the rotation has Pillow's fixed-point arithmetic: whole numbers, so the same pixels everywhere.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_FRACTION_BITS = 16
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


def check_shape(name: str, array: jax.Array, *shape: int) -> None:
    """Raise ValueError unless `array` has `shape`, whose first axis is that of the images."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, one per image, got {array.shape}")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless `value` lies in 0 .. 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")


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


def _pixel_grid(height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Columns int32 [1, 1, W] and rows int32 [1, H, 1] of all pixels."""
    return jnp.arange(width, dtype=jnp.int32)[None, None, :], jnp.arange(height, dtype=jnp.int32)[None, :, None]


def image_corners(height: int, width: int) -> np.ndarray:
    """Pixel indices (x, y) of the corners, int32 [4, 2]: upper left, upper right, lower right, lower left."""
    right, bottom = width - 1, height - 1
    return np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]], np.int32)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def perspective_coefficients(corners: jax.Array, height: int, width: int) -> jax.Array:
    """What maps an output position to the input position it shows, given where the input's corners go.

    With coefficients a .. i, (x, y) in the output shows ((a x + b y + c) / w, (d x + e y + f) / w) of the input, with
    w = g x + h y + i; they take each of `corners` to the corner of the image it came from. This is the inverse, written
    out, of the map from the unit square to a quadrilateral (P. Heckbert, "Fundamentals of Texture Mapping and Image
    Warping", 1989, section 2.2.3): some hundred operations on [N], and wrong by about the rounding of float32.

    torchvision and Pillow want i = 1: divide by the ninth for theirs. torchvision solves eight equations for them, and
    has no solution where i is 0, the horizon running through the upper left pixel. That happens to 1 in 1,000 of
    8x8 images; here it is a case like any other.

    Example::

        >>> import jax.numpy as jnp
        >>> from pspinal_jax.augment import perspective_coefficients
        >>> corners = jnp.array([[[0, 0], [2, 0], [2, 4], [0, 4]]])      # the right edge moves in by 2
        >>> perspective_coefficients(corners, height=5, width=5)[0, 0].item()
        2.0

    Args:
      corners: [N, 4, 2], (x, y) of where the upper left, upper right, lower right and lower left pixel go; no three on
        a line, or the image comes out black.
      height: H of the images.
      width: W of the images.

    Returns:
      float32 [N, 9], with w = 1 where the upper left pixel goes; the identity, exactly, for corners that did not move.

    Raises:
      ValueError: if `corners` has another shape, or a side of the image is a single pixel.
    """
    if min(height, width) < 2:
        raise ValueError(f"perspective needs images of at least 2x2 pixels, got {height}x{width}")
    if corners.ndim != 3 or corners.shape[1:] != (4, 2):
        raise ValueError(f"corners must have shape [N, 4, 2], got {corners.shape}")
    still = jnp.all(corners == image_corners(height, width), axis=(1, 2))
    corners = corners.astype(jnp.float32)
    matrix = _inverse(_from_unit_square(corners))
    depth = matrix[6] * corners[:, 0, 0] + matrix[7] * corners[:, 0, 1] + matrix[8]
    # The unit square becomes the image: its corner pixels are `width - 1` and `height - 1` apart.
    scale = [width - 1] * 3 + [height - 1] * 3 + [1] * 3
    solved = jnp.stack([entry * by / depth for entry, by in zip(matrix, scale, strict=True)], axis=1)
    return jnp.where(still[:, None], jnp.eye(3, dtype=jnp.float32).reshape(9), solved)


@jax.jit
def warp_perspective(images: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Images seen in perspective: bilinear, 0 where the input does not reach, truncated to uint8.

    The arithmetic is that of Pillow's ``transform(size, PERSPECTIVE, coefficients, BILINEAR)``: output positions are
    pixel centres. It is done in float32 where Pillow has float64, which changes about 3 in 100,000 pixels of 28x28
    digits, each by one level.

    Args:
      images: uint8 [N, H, W, C].
      coefficients: float32 [N, 9], see `perspective_coefficients`.

    Returns:
      uint8 [N, H, W, C].

    Raises:
      TypeError: if `images` is not uint8.
      ValueError: if either has another shape.
    """
    check_images(images)
    count, height, width, _ = images.shape
    check_shape("coefficients", coefficients, count, 9)
    return sample_bilinear(images, *perspective_positions(coefficients, *_pixel_grid(height, width)))


def perspective_positions(coefficients: jax.Array, columns: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Input positions (x, y), float32 [N, R, S], of output pixels at int32 `columns` and `rows`, at their centres."""
    a, b, c, d, e, f, g, h, i = (per_image(coefficients[:, index]) for index in range(9))
    x, y = columns.astype(jnp.float32) + 0.5, rows.astype(jnp.float32) + 0.5
    depth = g * x + h * y + i
    return (a * x + b * y + c) / depth, (d * x + e * y + f) / depth


def _from_unit_square(corners: jax.Array) -> list[jax.Array]:
    """Rows of the 3x3 matrix, nine times [N], that takes (0, 0), (1, 0), (1, 1), (0, 1) to `corners` [N, 4, 2].

    It is scaled so that whole-numbered corners give whole numbers throughout.
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = ((corners[:, index, 0], corners[:, index, 1]) for index in range(4))
    right_x, right_y, lower_x, lower_y = x1 - x2, y1 - y2, x3 - x2, y3 - y2
    sum_x, sum_y = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    scale = right_x * lower_y - lower_x * right_y
    g = sum_x * lower_y - lower_x * sum_y
    h = right_x * sum_y - sum_x * right_y
    across = [(x1 - x0) * scale + g * x1, (x3 - x0) * scale + h * x3, x0 * scale]
    down = [(y1 - y0) * scale + g * y1, (y3 - y0) * scale + h * y3, y0 * scale]
    return [*across, *down, g, h, scale]


def _inverse(matrix: list[jax.Array]) -> list[jax.Array]:
    """The inverse of a 3x3 matrix given by rows, up to a factor: its adjugate."""
    a, b, c, d, e, f, g, h, i = matrix
    first = [e * i - f * h, c * h - b * i, b * f - c * e]
    second = [f * g - d * i, a * i - c * g, c * d - a * f]
    third = [d * h - e * g, b * g - a * h, a * e - b * d]
    return [*first, *second, *third]


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
    check_fraction("distortion", distortion)
    check_fraction("probability", probability)
    # All nine numbers of an image in one flat draw: with axes, or in two draws, it takes four times as long to compile.
    numbers = jax.random.uniform(key, (count * 9,), jnp.float32).reshape(count, 9)
    furthest = np.array([int(distortion * (side // 2)) for side in (width, height)], np.float32)
    # The largest number below 1 times a whole number rounds to less than that, so no corner goes too far.
    offsets = jnp.floor(numbers[:, 1:].reshape(count, 4, 2) * (furthest + 1)).astype(jnp.int32)
    inward = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.int32)
    moved = (numbers[:, 0] < probability)[:, None, None]
    return jnp.where(moved, offsets * inward, 0) + image_corners(height, width)


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
    check_shape("angles", angles, len(images))
    return sample_nearest(images, *rotation_sources(angles, images.shape[1], images.shape[2]))


def rotation_sources(angles: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Which input pixel each output pixel shows; see `rotation_sources_at`. Returns int32 [N, H, W] twice."""
    return rotation_sources_at(angles, height, width, *_pixel_grid(height, width))


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


def _fixed(values: jax.Array) -> jax.Array:
    """`values` in units of 2**-16, rounded half up as Pillow does, int32."""
    return jnp.floor(values * (1 << _FRACTION_BITS) + 0.5).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("count", "degrees"))
def draw_angles(key: jax.Array, count: int, *, degrees: float = 10.0) -> jax.Array:
    """Angles of `count` images, float32 [N] uniform in ±`degrees`, as torchvision's RandomRotation draws them.

    Raises:
      ValueError: if `degrees` is negative.
    """
    if not degrees >= 0:
        raise ValueError(f"degrees must be at least 0, got {degrees!r}")
    return jax.random.uniform(key, (count,), jnp.float32, -degrees, degrees)


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
