"""Batch norm with batch statistics, alone or followed by ReLU, with a hand-written backward pass."""

import jax
import jax.numpy as jnp
from jax import lax

from pspinal_jax.heads import norm

_AXES = (0, 1, 2)
_Results = tuple[jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def norm_relu(inputs: jax.Array, scale: jax.Array, bias: jax.Array) -> _Results:
    """relu(batch_norm(inputs)) with the statistics of `inputs` themselves, torch's conventions (see heads/norm.py).

    The backward pass is the textbook one: one sweep for the two sums per channel, one for the input's gradient, where
    autodiff of mean, variance, normalisation and ReLU makes several. It recomputes the normalised values from
    `inputs`, so that nothing but `inputs` is kept. Reverse-mode derivatives only (a custom VJP).

    Args:
      inputs: floating-point [N, H, W, C].
      scale: [C].
      bias: [C].

    Returns:
      (outputs [N, H, W, C] of `inputs`' dtype, mean [C], biased variance [C]), the statistics in float32 or wider; no
      gradient flows through the statistics.
    """
    outputs, mean, variance = batch_norm(inputs, scale, bias)
    return jax.nn.relu(outputs), mean, variance


@jax.custom_vjp
def batch_norm(inputs: jax.Array, scale: jax.Array, bias: jax.Array) -> _Results:
    """As `norm_relu`, without the ReLU."""
    mean, variance = norm.batch_statistics(inputs)
    return norm.normalize(inputs, mean, variance, scale, bias), mean, variance


def _norm_relu_fwd(inputs: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[_Results, tuple]:
    outputs = norm_relu(inputs, scale, bias)
    return outputs, (inputs, scale, bias, *outputs[1:])


def _norm_relu_bwd(residuals: tuple, cotangents: tuple) -> _Results:
    inputs, scale, bias, mean, variance = residuals
    # The very expression of the forward pass, so that an output of exactly 0 (ReLU's gradient: 0) is judged alike.
    alive = norm.normalize(inputs, mean, variance, scale, bias) > 0
    return _gradients(residuals, jnp.where(alive, cotangents[0].astype(mean.dtype), 0))


def _batch_norm_fwd(inputs: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[_Results, tuple]:
    outputs = batch_norm(inputs, scale, bias)
    return outputs, (inputs, scale, bias, *outputs[1:])


def _batch_norm_bwd(residuals: tuple, cotangents: tuple) -> _Results:
    return _gradients(residuals, cotangents[0].astype(residuals[3].dtype))


def _gradients(residuals: tuple, grad: jax.Array) -> _Results:
    """Of inputs, scale and bias, for the gradient of the normalised values in the statistics' dtype."""
    inputs, scale, bias, mean, variance = residuals
    dtype = mean.dtype
    count = inputs.size // inputs.shape[-1]
    inverse = lax.rsqrt(variance + norm.EPSILON)
    centred = (inputs.astype(dtype) - mean) * inverse
    grad_bias = jnp.sum(grad, _AXES)
    grad_scale = jnp.sum(grad * centred, _AXES)
    grad_inputs = (grad - grad_bias / count - centred * (grad_scale / count)) * (inverse * scale.astype(dtype))
    return grad_inputs.astype(inputs.dtype), grad_scale.astype(scale.dtype), grad_bias.astype(bias.dtype)


norm_relu.defvjp(_norm_relu_fwd, _norm_relu_bwd)
batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)
