"""A stride-1, same-size convolution whose gradient runs at full speed inside a compiled loop on CPU.

XLA rewrites convolutions to its fast CPU routine (Eigen) only in the plain NHWC / HWIO / NHWC layout. Outside of loops
a layout pass brings autodiff's transposed convolutions into that layout; inside lax.scan, while_loop and fori_loop it
does not, and they fall back to a naive loop nest that is 30 to 65 times slower (jax 0.10 to 0.12; jax-ml/jax#12868).
So both gradients are written here as convolutions in the plain layout, with the transposes spelt out.
"""

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv_same(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """2-D cross-correlation, stride 1, zero padding (k - 1) / 2 on each side, as torch.nn.Conv2d without bias.

    Reverse-mode derivatives only (a custom VJP).

    Args:
      inputs: floating-point [N, H, W, I].
      kernel: [K, K', I, O] of the same dtype, K and K' odd.

    Returns:
      [N, H, W, O] of that dtype.

    Raises:
      ValueError: if a kernel side is even, or the channel counts differ.
    """
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"conv_same needs odd kernel sides, got a kernel of shape {kernel.shape}")
    if inputs.shape[-1] != kernel.shape[2]:
        raise ValueError(f"a kernel of shape {kernel.shape} does not fit the channels of inputs {inputs.shape}")
    return _conv(inputs, kernel)


def _plain(inputs: jax.Array, kernel: jax.Array, sides: tuple[int, ...]) -> jax.Array:
    """The convolution with padding for a kernel of `sides` (which is not `kernel`'s size in the filter gradient)."""
    padding = [(side // 2, side // 2) for side in sides]
    return lax.conv_general_dilated(inputs, kernel, (1, 1), padding, dimension_numbers=_LAYOUT)


@jax.custom_vjp
def _conv(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return _plain(inputs, kernel, kernel.shape[:2])


def _conv_fwd(inputs: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv(inputs, kernel), (inputs, kernel)


def _conv_bwd(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Only XLA's CPU compiler needs the spelt-out form; cuDNN and the TPU have gradient kernels of their own, which
    # autodiff's form selects. Lowering for one platform keeps that platform's branch alone.
    return lax.platform_dependent(*residuals, grad, cpu=_gradients_plain_layout, default=_gradients_autodiff)


def _gradients_plain_layout(inputs: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    sides = kernel.shape[:2]
    # d inputs: the correlation's transpose is the correlation with the kernel turned round, channels swapped.
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    grad_inputs = _plain(grad, turned, sides)
    # d kernel: channels act as batch and images as channels; the output's K x K' positions are the kernel's entries.
    by_channel = _plain(inputs.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3), sides)
    return grad_inputs, by_channel.transpose(1, 2, 0, 3)


def _gradients_autodiff(inputs: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, pullback = jax.vjp(lambda x, k: _plain(x, k, kernel.shape[:2]), inputs, kernel)
    return pullback(grad)


_conv.defvjp(_conv_fwd, _conv_bwd)
