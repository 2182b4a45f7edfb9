"""Depthwise convolutions with TensorFlow's SAME padding, fast on CPU too.

XLA's CPU compiler turns a convolution with one group a channel into a naive loop nest (jax-ml/jax#23713). As a sum of
K x K' shifted, strided slices, each times one row of weights, it becomes one vectorised loop. Accelerators have kernels
of their own for it, so there it stays a convolution: the branch is chosen where the program is lowered.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def same_padding(sides: Sequence[int], kernel: Sequence[int], stride: int) -> list[tuple[int, int]]:
    """TensorFlow's SAME padding (before, after) of each side: with an odd total the extra row comes at the end."""
    totals = [max((-(-side // stride) - 1) * stride + k - side, 0) for side, k in zip(sides, kernel, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def depthwise_conv(inputs: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Each channel's 2-D cross-correlation with its own kernel, under TensorFlow's SAME padding.

    Reverse-mode derivatives only (a custom VJP).

    Args:
      inputs: floating-point [N, H, W, C].
      kernel: [K, K', 1, C] of the same dtype.
      stride: of both sides.

    Returns:
      [N, ceil(H / stride), ceil(W / stride), C] of that dtype.

    Raises:
      ValueError: if the kernel does not fit the channels.
    """
    if kernel.ndim != 4 or kernel.shape[2:] != (1, inputs.shape[-1]):
        raise ValueError(
            f"a depthwise kernel is [K, K', 1, {inputs.shape[-1]}] for inputs {inputs.shape}, got {kernel.shape}"
        )
    return _depthwise(stride, inputs, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise(stride: int, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.platform_dependent(inputs, kernel, cpu=partial(_shifts, stride), default=partial(_grouped, stride))


def _forward(stride: int, inputs: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _depthwise(stride, inputs, kernel), (inputs, kernel)


def _backward(stride: int, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    def through(form: Callable[..., jax.Array], inputs: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple:
        return jax.vjp(partial(form, stride), inputs, kernel)[1](grad)

    return lax.platform_dependent(*residuals, grad, cpu=partial(through, _shifts), default=partial(through, _grouped))


def _shifts(stride: int, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, columns = kernel.shape[:2]
    height, width = (-(-side // stride) for side in inputs.shape[1:3])
    padded = jnp.pad(inputs, [(0, 0), *same_padding(inputs.shape[1:3], (rows, columns), stride), (0, 0)])
    total = jnp.zeros((), inputs.dtype)
    for row in range(rows):
        for column in range(columns):
            last = (row + (height - 1) * stride + 1, column + (width - 1) * stride + 1)
            part = padded[:, row : last[0] : stride, column : last[1] : stride]
            total = total + part * kernel[row, column, 0]
    return total


def _grouped(stride: int, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        inputs,
        kernel,
        (stride, stride),
        same_padding(inputs.shape[1:3], kernel.shape[:2], stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=inputs.shape[-1],
    )


_depthwise.defvjp(_forward, _backward)
