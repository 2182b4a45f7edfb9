"""Max pooling with a cheap gradient.

The gradient of lax.reduce_window's maximum is a select-and-scatter, which XLA's CPU backend runs one element at a time
(79 ms of a VGG-5 step at batch 64). Here it is elementwise operations on strided slices: four for 2x2 windows side by
side, nine for the overlapping 3x3 windows of a ResNet.
"""

import jax
import jax.numpy as jnp
from jax import lax

_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def _corners(inputs: jax.Array) -> list[jax.Array]:
    """The four entries of every 2x2 window in row-major order, each [N, H // 2, W // 2, C]."""
    height, width = (inputs.shape[1] // 2 * 2, inputs.shape[2] // 2 * 2)
    return [inputs[:, row:height:2, column:width:2] for row, column in _CORNERS]


@jax.custom_vjp
def max_pool_2x2(inputs: jax.Array) -> jax.Array:
    """Maximum over 2x2 windows, stride 2, an odd last row or column left out, as torch.nn.MaxPool2d(2, 2).

    The gradient goes to the first maximum of a window in row-major order, as torch's does. (autodiff of jnp.maximum
    would split it between equals.) Reverse-mode derivatives only (a custom VJP).

    Args:
      inputs: [N, H, W, C], H and W at least 2.

    Returns:
      [N, H // 2, W // 2, C] of the same dtype.
    """
    first, second, third, fourth = _corners(inputs)
    return jnp.maximum(jnp.maximum(first, second), jnp.maximum(third, fourth))


def _pool_fwd(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    return max_pool_2x2(inputs), inputs


def _pool_bwd(inputs: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    return (unpool(first_maximum(inputs), grad, inputs.shape),)


def first_maximum(inputs: jax.Array) -> list[jax.Array]:
    """For each of the four corners, whether it is its window's first maximum: four masks [N, H // 2, W // 2, C]."""
    first, second, third, fourth = _corners(inputs)
    in_top = jnp.maximum(first, second) >= jnp.maximum(third, fourth)
    left_of_top, left_of_bottom = first >= second, third >= fourth
    return [in_top & left_of_top, in_top & ~left_of_top, ~in_top & left_of_bottom, ~in_top & ~left_of_bottom]


def unpool(masks: list[jax.Array], grad: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`grad` [N, H // 2, W // 2, C] put where the masks say, zero elsewhere, in an array of `shape` [N, H, W, C]."""
    first, second, third, fourth = (jnp.where(mask, grad, jnp.zeros((), grad.dtype)) for mask in masks)
    odd = [(0, side % 2) for side in shape[1:3]]
    return jnp.pad(_interleaved([[first, second], [third, fourth]]), ((0, 0), *odd, (0, 0)))


def _interleaved(planes: list[list[jax.Array]]) -> jax.Array:
    """[N, 2 H, 2 W, C], of which `planes[i][j]` [N, H, W, C] is every second row from i and column from j.

    A pad of each with zeros between its entries, and their sum, takes XLA's CPU code longer, in bfloat16 most.
    """
    count, rows, columns, channels = planes[0][0].shape
    both = jnp.stack([jnp.stack(row, 3) for row in planes], 2)
    return both.reshape(count, 2 * rows, 2 * columns, channels)


max_pool_2x2.defvjp(_pool_fwd, _pool_bwd)


_ENTRIES = tuple((row, column) for row in range(3) for column in range(3))


@jax.custom_vjp
def max_pool_3x3(inputs: jax.Array) -> jax.Array:
    """Maximum over 3x3 windows, stride 2, as torch.nn.MaxPool2d(3, stride=2, padding=1): padding never wins.

    The gradient goes to the first maximum of a window in row-major order, as torch's does. Reverse-mode derivatives
    only (a custom VJP).

    Args:
      inputs: floating-point [N, H, W, C], H and W at least 1.

    Returns:
      [N, ceil(H / 2), ceil(W / 2), C] of the same dtype.
    """
    # Only the gradient of reduce_window is slow; forward it takes half the time of a maximum of nine slices.
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(inputs, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _entries(inputs: jax.Array) -> list[jax.Array]:
    """The nine entries of every window in row-major order, each [N, ceil(H / 2), ceil(W / 2), C]."""
    height, width = inputs.shape[1:3]
    around = ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0))
    padded = jnp.pad(inputs, around, constant_values=-jnp.inf)
    # The last window starts at 2 * ceil(side / 2) - 2; stopping just past its entry gives every entry the same count.
    last = [(side + 1) // 2 * 2 - 1 for side in (height, width)]
    return [padded[:, row : last[0] + row : 2, column : last[1] + column : 2] for row, column in _ENTRIES]


def _pool_3x3_fwd(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    return max_pool_3x3(inputs), inputs


def _pool_3x3_bwd(inputs: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    # Which entry wins is stored as its number. Asking which EQUALS the maximum would be wrong: XLA may compute the
    # inputs again for the backward pass, in an order of its own, and no entry or another one is equal then.
    entries = _entries(inputs)
    best, winner = entries[0], jnp.zeros(grad.shape, jnp.uint8)
    for number, entry in enumerate(entries[1:], start=1):
        winner = jnp.where(entry > best, jnp.uint8(number), winner)
        best = jnp.maximum(best, entry)
    # Row 2 a of the inputs is entry row 1 of the windows at a; row 2 a + 1 is 2 of these and 0 of those at a + 1.
    (height, width), (rows, columns) = inputs.shape[1:3], grad.shape[1:3]
    after = ((0, 0), (0, 1), (0, 1), (0, 0))
    winner, grad = jnp.pad(winner, after), jnp.pad(grad, after)

    def won(number: int) -> jax.Array:
        row, column = (int(entry == 0) for entry in divmod(number, 3))
        at = (slice(None), slice(row, row + rows), slice(column, column + columns))
        return jnp.where(winner[at] == number, grad[at], jnp.zeros((), grad.dtype))

    even = [won(4), won(3) + won(5)]
    odd = [won(1) + won(7), won(0) + won(2) + won(6) + won(8)]
    return (_interleaved([even, odd])[:, :height, :width],)


max_pool_3x3.defvjp(_pool_3x3_fwd, _pool_3x3_bwd)
