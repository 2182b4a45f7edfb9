"""Convolutions with torch's padding whose gradients run at full speed inside a compiled loop on CPU.

XLA rewrites convolutions to its fast CPU routine (Eigen) only in the plain NHWC / HWIO / NHWC layout. Outside of loops
a layout pass brings autodiff's transposed convolutions into that layout; inside lax.scan, while_loop and fori_loop it
does not, and they fall back to a naive loop nest that is 30 to 65 times slower (jax 0.10 to 0.12; jax-ml/jax#12868).
So both gradients are written here as convolutions in the plain layout, with the transposes spelt out.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pspinal_jax.environment import library_convolves
from pspinal_jax.layers.linear import product, summed_as

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_Padding = Sequence[tuple[int, int]]


def conv_same(inputs: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """2-D cross-correlation, zero padding (k - 1) / 2 on each side, as torch.nn.Conv2d(padding=k // 2) without bias.

    With stride 2 that is not what XLA and TensorFlow call SAME, which pads an even side at its end only. Reverse-mode
    derivatives only (a custom VJP).

    Args:
      inputs: floating-point [N, H, W, I].
      kernel: [K, K', I, O] of the same dtype, K and K' odd.
      stride: of both sides.

    Returns:
      [N, ceil(H / stride), ceil(W / stride), O] of that dtype.

    Raises:
      ValueError: if a kernel side is even, or the channel counts differ.
    """
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"conv_same needs odd kernel sides, got a kernel of shape {kernel.shape}")
    if inputs.shape[-1] != kernel.shape[2]:
        raise ValueError(f"a kernel of shape {kernel.shape} does not fit the channels of inputs {inputs.shape}")
    if kernel.shape[:2] == (1, 1):
        return pointwise(inputs, kernel[0, 0], stride)
    if inputs.shape[1] < kernel.shape[0] or inputs.shape[2] < kernel.shape[1]:
        return _as_product(inputs, kernel, stride)
    return _conv(stride, inputs, kernel)


def pointwise(inputs: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """A 1x1 convolution: a product of matrices, whose gradients are such products too, fast in a loop as elsewhere.

    [N, H, W, I] and [I, O] -> [N, ceil(H / stride), ceil(W / stride), O].
    """
    inputs = inputs[:, ::stride, ::stride]
    if library_convolves():
        return _convolved(inputs, kernel)
    return product(_rows(inputs), kernel).reshape(*inputs.shape[:-1], kernel.shape[-1])


def _rows(maps: jax.Array) -> jax.Array:
    """[N H W, C]: for a product over more axes XLA's CPU code first copies a gradient turned around, which takes
    longer than the product.
    """
    return maps.reshape(-1, maps.shape[-1])


@jax.custom_vjp
def _convolved(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """By oneDNN, which adds a bias and cuts at 0 and 6 in the same pass; but the kernel's gradient is a product."""
    return _plain(inputs, kernel[None, None], [(0, 0), (0, 0)])


def _convolved_fwd(inputs: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolved(inputs, kernel), (inputs, kernel)


def _convolved_bwd(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = residuals
    # Not `product`: oneDNN's with 16 bits sums in float32 all the same, and is faster than one that gives float32.
    _, pullback = jax.vjp(partial(jnp.matmul, _rows(inputs)), kernel)
    (kernel_grad,) = pullback(_rows(grad))
    return summed_as(_convolved(grad, kernel.T), inputs), summed_as(kernel_grad, kernel)


_convolved.defvjp(_convolved_fwd, _convolved_bwd)


def _as_product(inputs: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """On maps smaller than the kernel XLA's CPU routine takes 10 to 70 times as long as the product of all patches."""
    height, width = inputs.shape[1:3]
    rows, columns, _, channels = kernel.shape
    padded = jnp.pad(inputs, [(0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)])
    patches = [
        padded[:, row : row + height : stride, column : column + width : stride]
        for row in range(rows)
        for column in range(columns)
    ]
    return jnp.tensordot(jnp.concatenate(patches, -1), kernel.reshape(-1, channels), 1)


def _plain(
    inputs: jax.Array, kernel: jax.Array, padding: _Padding, stride: int = 1, spread: tuple[int, int] = (1, 1)
) -> jax.Array:
    """The convolution; `spread` puts that many entries less one of zeros between those of `inputs`, and of `kernel`."""
    lhs, rhs = ((side, side) for side in spread)
    return lax.conv_general_dilated(inputs, kernel, (stride, stride), padding, lhs, rhs, dimension_numbers=_LAYOUT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(stride: int, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return _forward(stride, inputs, kernel)


def _forward(stride: int, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return _plain(inputs, kernel, [(side // 2, side // 2) for side in kernel.shape[:2]], stride)


def _conv_fwd(stride: int, inputs: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _forward(stride, inputs, kernel), (inputs, kernel)


def _conv_bwd(stride: int, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Only XLA's CPU compiler needs them spelt out; cuDNN and the TPU have gradient kernels of their own, which
    # autodiff selects. Lowering for one platform leaves that platform's branch alone.
    plain, autodiff = partial(_gradients_plain_layout, stride), partial(_gradients_autodiff, stride)
    return lax.platform_dependent(*residuals, grad, cpu=plain, default=autodiff)


def _gradients_plain_layout(
    stride: int, inputs: jax.Array, kernel: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    sides = list(zip(inputs.shape[1:3], kernel.shape[:2], grad.shape[1:3], strict=True))
    # With a stride the output's entries lie that far apart on the input. What they span, less the input's side: -1 for
    # an even side under stride 2, else 0.
    excess = [(count - 1) * stride + 1 - side for side, _, count in sides]
    # d inputs: the correlation's transpose is the correlation with the kernel turned round, channels swapped.
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    padding = [(k // 2, k // 2 - more) for (_, k, _), more in zip(sides, excess, strict=True)]
    grad_inputs = _plain(grad, turned, padding, spread=(stride, 1))
    # d kernel: channels act as batch and images as channels; the output's K x K' positions are the kernel's entries.
    padding = [(k // 2, k // 2 + more) for (_, k, _), more in zip(sides, excess, strict=True)]
    by_channel = _plain(inputs.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3), padding, spread=(1, stride))
    return grad_inputs, by_channel.transpose(1, 2, 0, 3)


def _gradients_autodiff(
    stride: int, inputs: jax.Array, kernel: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, pullback = jax.vjp(partial(_forward, stride), inputs, kernel)
    return pullback(grad)


_conv.defvjp(_conv_fwd, _conv_bwd)
