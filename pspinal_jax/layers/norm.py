"""Batch norm with torch's conventions, as functions of arrays; for maps also with a hand-written backward pass.

torch puts the UNBIASED variance (factor n / (n - 1)) into its running statistics and normalises a training batch with
the biased one; flax.linen.BatchNorm uses the biased one for both. The published scripts follow torch.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

EPSILON = 1e-5
MOMENTUM = 0.9
"""Weight of the old running average (torch writes the same as momentum 0.1)."""


def statistics_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that means and variances are computed and stored in: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def batch_statistics(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of `inputs` [..., W] over all axes but the last, each [W] and float32 or wider."""
    inputs = inputs.astype(statistics_dtype(inputs.dtype))
    axes = tuple(range(inputs.ndim - 1))
    mean = jnp.mean(inputs, axes)
    # Two passes: E[x^2] - E[x]^2 loses digits, and XLA's CPU code for it is the slower of the two.
    variance = jnp.mean(jnp.square(inputs - mean.reshape((1,) * len(axes) + mean.shape)), axes)
    return mean, variance


def normalize(
    inputs: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float = EPSILON,
) -> jax.Array:
    """(inputs - mean) / sqrt(variance + epsilon) * scale + bias, in float32 or wider, given in `inputs`' dtype."""
    dtype = statistics_dtype(inputs.dtype)

    def aligned(values: jax.Array) -> jax.Array:  # under numpy_rank_promotion('raise') ranks have to be equal
        return values.astype(dtype).reshape((1,) * (inputs.ndim - 1) + values.shape)

    factor = jax.lax.rsqrt(aligned(variance) + epsilon) * aligned(scale)
    return ((inputs.astype(dtype) - aligned(mean)) * factor + aligned(bias)).astype(inputs.dtype)


def fold(
    kernel: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float = EPSILON,
) -> tuple[jax.Array, jax.Array]:
    """The kernel [.., C] and bias [1, 1, 1, C] with which a convolution gives what `normalize` makes of its outputs.

    Where oneDNN convolves, a bias and a ReLU after it cost no further pass over memory.
    """
    factor = lax.rsqrt(variance + epsilon) * scale.astype(variance.dtype)
    shift = bias.astype(variance.dtype) - mean * factor
    return kernel.astype(variance.dtype) * factor[None, None, None], shift[None, None, None]


def update_running(
    running_mean: jax.Array, running_var: jax.Array, mean: jax.Array, variance: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """New running mean and variance after a batch of `count` rows with that mean and biased variance."""
    unbiased = variance * (count / (count - 1)) if count > 1 else variance
    new_mean = MOMENTUM * running_mean + (1 - MOMENTUM) * mean.astype(running_mean.dtype)
    new_var = MOMENTUM * running_var + (1 - MOMENTUM) * unbiased.astype(running_var.dtype)
    return new_mean, new_var


def check_mutable(module: nn.Module) -> None:
    """Raise ValueError where a training pass of `module` would silently drop the running statistics.

    flax.linen.BatchNorm raises in this case too.
    """
    if not module.is_mutable_collection("batch_stats"):
        raise ValueError(
            "batch norm in training updates its running statistics, but batch_stats is not mutable: call "
            "apply(.., mutable=['batch_stats']) and keep what it returns, or train=False"
        )


def check_rows(shape: tuple[int, ...]) -> int:
    """The number of rows of a training batch of `shape`; ValueError where batch norm cannot learn from it."""
    rows = math.prod(shape[:-1])
    if rows < 2:
        raise ValueError(
            f"batch norm in training needs at least 2 rows, got features of shape {shape}; "
            "use a larger batch or train=False"
        )
    return rows


def train_norm(
    module: nn.Module,
    inputs: jax.Array,
    affine: dict[str, jax.Array],
    running: dict[str, nn.Variable],
    *,
    relu: bool = True,
    epsilon: float = EPSILON,
    cap: float = math.inf,
    bias: jax.Array | None = None,
) -> jax.Array:
    """A training pass over maps: batch norm of `inputs`, then ReLU if `relu`; `module` learns the running statistics.

    Batch norm subtracts the batch mean, and with it the `bias` [C] of a convolution before it: that reaches the running
    mean and nothing else, and its gradient is exactly zero (torch's is rounding noise of about 1e-9 of the others').
    """
    if relu:
        outputs, mean, variance = norm_relu(inputs, affine["scale"], affine["bias"], epsilon, cap)
    else:
        outputs, mean, variance = batch_norm(inputs, affine["scale"], affine["bias"], epsilon)
    check_mutable(module)
    if bias is not None:
        mean = mean + lax.stop_gradient(bias).astype(mean.dtype)
    old, count = (running["mean"].value, running["var"].value), outputs.size // outputs.shape[-1]
    running["mean"].value, running["var"].value = update_running(*old, mean, variance, count)
    return outputs


_AXES = (0, 1, 2)
_Results = tuple[jax.Array, jax.Array, jax.Array]


def norm_relu(
    inputs: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float = EPSILON, cap: float = math.inf
) -> _Results:
    """relu(batch_norm(inputs)) with the statistics of `inputs` themselves, torch's conventions.

    The backward pass is the textbook one: one sweep for the two sums per channel, one for the input's gradient, where
    autodiff of mean, variance, normalisation and ReLU makes several. It recomputes the normalised values from
    `inputs`, so that nothing but `inputs` is stored. Reverse-mode derivatives only (a custom VJP).

    Args:
      inputs: floating-point [N, H, W, C].
      scale: [C].
      bias: [C].
      epsilon: added to the variance.
      cap: what outputs are cut at, 6 for ReLU6.

    Returns:
      (outputs [N, H, W, C] of `inputs`' dtype, mean [C], biased variance [C]), the statistics in float32 or wider; no
      gradient flows through the statistics.
    """
    return _normalized(epsilon, cap, inputs, scale, bias)


def batch_norm(inputs: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float = EPSILON) -> _Results:
    """Batch norm without a ReLU; otherwise `norm_relu`."""
    return _normalized(epsilon, None, inputs, scale, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalized(epsilon: float, cap: float | None, inputs: jax.Array, scale: jax.Array, bias: jax.Array) -> _Results:
    mean, variance = batch_statistics(inputs)
    outputs = normalize(inputs, mean, variance, scale, bias, epsilon)
    if cap is not None:
        outputs = jnp.clip(outputs, 0, cap)
    return outputs, mean, variance


def _normalized_fwd(
    epsilon: float, cap: float | None, inputs: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[_Results, tuple]:
    outputs = _normalized(epsilon, cap, inputs, scale, bias)
    return outputs, (inputs, scale, bias, *outputs[1:])


def _normalized_bwd(epsilon: float, cap: float | None, residuals: tuple, cotangents: tuple) -> _Results:
    inputs, scale, bias, mean, variance = residuals
    grad = cotangents[0].astype(mean.dtype)
    if cap is not None:
        # The very expression of the forward pass, so that an output of exactly 0 (ReLU's gradient: 0) is judged alike.
        normalized = normalize(inputs, mean, variance, scale, bias, epsilon)
        grad = jnp.where((normalized > 0) & (normalized < cap), grad, 0)
    dtype, count = mean.dtype, inputs.size // inputs.shape[-1]
    inverse = lax.rsqrt(variance + epsilon)
    values = inputs.astype(dtype)
    grad_bias = jnp.sum(grad, _AXES)
    # Of grad * (values - mean), XLA's CPU compiler would first write out the second factor.
    grad_scale = (jnp.sum(grad * values, _AXES) - mean * grad_bias) * inverse
    centred = (values - mean) * inverse
    grad_inputs = (grad - grad_bias / count - centred * (grad_scale / count)) * (inverse * scale.astype(dtype))
    return grad_inputs.astype(inputs.dtype), grad_scale.astype(scale.dtype), grad_bias.astype(bias.dtype)


_normalized.defvjp(_normalized_fwd, _normalized_bwd)
