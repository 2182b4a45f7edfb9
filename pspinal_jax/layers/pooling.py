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
    zero = jnp.zeros((), grad.dtype)
    total: jax.Array | None = None
    for mask, (row, column) in zip(masks, _CORNERS, strict=True):
        # Interior padding of 1 spreads the windows out; the edges place this corner and fill an odd last row or column.
        rows = (row, shape[1] - (2 * grad.shape[1] - 1) - row, 1)
        columns = (column, shape[2] - (2 * grad.shape[2] - 1) - column, 1)
        spread = lax.pad(jnp.where(mask, grad, zero), zero, ((0, 0, 0), rows, columns, (0, 0, 0)))
        total = spread if total is None else total + spread
    return jnp.zeros(shape, grad.dtype) if total is None else total


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
    height, width = inputs.shape[1:3]
    zero = jnp.zeros((), grad.dtype)
    total = jnp.zeros(inputs.shape, grad.dtype)
    for number, (row, column) in enumerate(_ENTRIES):
        # Entry (row, column) of window w lies at 2 w + row - 1: the edges place it, and cut off the padding's part.
        rows = (row - 1, height - (2 * grad.shape[1] - 1) - (row - 1), 1)
        columns = (column - 1, width - (2 * grad.shape[2] - 1) - (column - 1), 1)
        won = jnp.where(winner == number, grad, zero)
        total += lax.pad(won, zero, ((0, 0, 0), rows, columns, (0, 0, 0)))
    return (total,)


max_pool_3x3.defvjp(_pool_3x3_fwd, _pool_3x3_bwd)
