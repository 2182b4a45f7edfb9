"""Perspective: an image's corners move to four points, and everything in between with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.augment.sampling import check_images, per_image, sample_bilinear


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
    check_coefficients(coefficients, images.shape[0])
    height, width = images.shape[1:3]
    x = jnp.arange(width, dtype=jnp.int32)[None, None, :]
    y = jnp.arange(height, dtype=jnp.int32)[None, :, None]
    return sample_bilinear(images, *perspective_positions(coefficients, x, y))


def perspective_positions(coefficients: jax.Array, columns: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Input positions (x, y), float32 [N, R, S], of output pixels at int32 `columns` and `rows`, at their centres."""
    a, b, c, d, e, f, g, h, i = (per_image(coefficients[:, index]) for index in range(9))
    x, y = columns.astype(jnp.float32) + 0.5, rows.astype(jnp.float32) + 0.5
    depth = g * x + h * y + i
    return (a * x + b * y + c) / depth, (d * x + e * y + f) / depth


def check_coefficients(coefficients: jax.Array, count: int) -> None:
    """Raise ValueError unless `coefficients` is [count, 9]."""
    if coefficients.shape != (count, 9):
        raise ValueError(f"coefficients must have shape [{count}, 9], one row per image, got {coefficients.shape}")


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
