"""Depthwise convolutions with TensorFlow's SAME padding, fast on CPU too.

XLA's CPU compiler turns a convolution with one group a channel into a naive loop nest (jax-ml/jax#23713). As a sum of
K x K' shifted, strided slices, each times one row of weights, it becomes one vectorised loop. oneDNN, where it
convolves (environment.py), is faster still, but not at kernels' gradients nor through a stride, and not in bfloat16,
which it leaves to the loop nest. Accelerators have kernels of their own for all of it, so there it stays a convolution:
the branch is chosen where the program is lowered. Sums of shifts are summed in float32 or wider, and rounded once.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pspinal_jax.environment import library_convolves


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
    on_cpu = _grouped if _by_library(inputs) else _shifts
    return lax.platform_dependent(inputs, kernel, cpu=partial(on_cpu, stride), default=partial(_grouped, stride))


def _by_library(inputs: jax.Array) -> bool:
    return library_convolves() and jnp.finfo(inputs.dtype).bits >= 32


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _forward(stride: int, inputs: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _depthwise(stride, inputs, kernel), (inputs, kernel)


def _backward(stride: int, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    def of_grouped(inputs: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs_grad, kernel_grad = jax.vjp(partial(_grouped, stride), inputs, kernel)[1](grad)
        return inputs_grad, kernel_grad

    by_library = _by_library(residuals[0]) and stride == 1

    def of_shifts(inputs: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs_grad = _inputs_grad(stride, inputs.shape, kernel, grad, by_library)
        return inputs_grad, _kernel_grad(stride, inputs, kernel.shape, grad)

    return lax.platform_dependent(*residuals, grad, cpu=of_shifts, default=of_grouped)


def _shifts(stride: int, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    padded = jnp.pad(inputs, [(0, 0), *same_padding(inputs.shape[1:3], kernel.shape[:2], stride), (0, 0)])
    sides = tuple(-(-side // stride) for side in inputs.shape[1:3])
    wide = _wide(inputs.dtype)
    kernel, total = kernel.astype(wide), jnp.zeros((), wide)
    for (row, column), part in _parts(padded, kernel.shape[:2], stride, sides):
        total = total + part.astype(wide) * kernel[row, column, 0]
    return total.astype(inputs.dtype)


def _parts(
    padded: jax.Array, kernel: Sequence[int], stride: int, sides: Sequence[int]
) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """What each entry (row, column) of the kernel sees of `padded` [..., H, W, C]: [..., *sides, C]."""
    for row, column in np.ndindex(*kernel):
        last = (row + (sides[0] - 1) * stride + 1, column + (sides[1] - 1) * stride + 1)
        yield (row, column), padded[..., row : last[0] : stride, column : last[1] : stride, :]


def _inputs_grad(stride: int, shape: Sequence[int], kernel: jax.Array, grad: jax.Array, by_library: bool) -> jax.Array:
    """The convolution again, of the gradient spread by the stride, with the kernel turned around: as a sum of shifts,
    where autodiff's sum of padded maps passes over memory once more for each entry of the kernel, or by oneDNN.
    """
    sides, size = shape[1:3], kernel.shape[:2]
    around = []
    for side, k, (before, _), count in zip(
        sides, size, same_padding(sides, size, stride), grad.shape[1:3], strict=True
    ):
        low = k - 1 - before
        around.append((low, side + k - 1 - low - ((count - 1) * stride + 1), stride - 1))
    spread = lax.pad(grad, jnp.zeros((), grad.dtype), [(0, 0, 0), *around, (0, 0, 0)])
    if by_library:
        # Without the barrier XLA makes the turn a property of the convolution, which oneDNN does not have.
        turned = lax.optimization_barrier(jnp.flip(kernel, (0, 1)))
        return _grouped(1, spread, turned, "VALID")
    wide = _wide(grad.dtype)
    kernel, total = kernel.astype(wide), jnp.zeros((), wide)
    for (row, column), part in _parts(spread, size, 1, sides):
        total = total + part.astype(wide) * kernel[-1 - row, -1 - column, 0]
    return total.astype(grad.dtype)


def _kernel_grad(stride: int, inputs: jax.Array, kernel: Sequence[int], grad: jax.Array) -> jax.Array:
    """Image by image, whose maps stay in the cache while each entry of the kernel sums over them."""
    padded = jnp.pad(inputs, [(0, 0), *same_padding(inputs.shape[1:3], kernel[:2], stride), (0, 0)])
    wide = _wide(grad.dtype)

    def add(total: jax.Array, image: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        image_inputs, image_grad = image[0], image[1].astype(wide)
        parts = _parts(image_inputs, kernel[:2], stride, image_grad.shape[:2])
        return total + jnp.stack([jnp.sum(part.astype(wide) * image_grad, (0, 1)) for _, part in parts]), None

    total, _ = lax.scan(add, jnp.zeros((kernel[0] * kernel[1], kernel[3]), wide), (padded, grad))
    return total.reshape(kernel).astype(grad.dtype)


def _grouped(
    stride: int, inputs: jax.Array, kernel: jax.Array, padding: Literal["VALID", "SAME"] = "SAME"
) -> jax.Array:
    return lax.conv_general_dilated(
        inputs,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=inputs.shape[-1],
    )


_depthwise.defvjp(_forward, _backward)
