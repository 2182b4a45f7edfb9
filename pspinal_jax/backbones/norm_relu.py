"""Batch norm with batch statistics followed by ReLU, with a hand-written backward pass."""

import jax
import jax.numpy as jnp
from jax import lax

from pspinal_jax.heads import norm

_AXES = (0, 1, 2)


@jax.custom_vjp
def norm_relu(inputs: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
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
    mean, variance = norm.batch_statistics(inputs)
    return jax.nn.relu(norm.normalize(inputs, mean, variance, scale, bias)), mean, variance


def _fwd(inputs: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[tuple, tuple]:
    outputs = norm_relu(inputs, scale, bias)
    return outputs, (inputs, scale, bias, *outputs[1:])


def _bwd(residuals: tuple, cotangents: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    inputs, scale, bias, mean, variance = residuals
    dtype = mean.dtype
    count = inputs.size // inputs.shape[-1]
    inverse = lax.rsqrt(variance + norm.EPSILON)
    centred = (inputs.astype(dtype) - mean) * inverse
    # The very expression of the forward pass, so that an output of exactly 0 (ReLU's gradient: 0) is judged alike.
    alive = norm.normalize(inputs, mean, variance, scale, bias) > 0
    grad = jnp.where(alive, cotangents[0].astype(dtype), 0)
    grad_bias = jnp.sum(grad, _AXES)
    grad_scale = jnp.sum(grad * centred, _AXES)
    grad_inputs = (grad - grad_bias / count - centred * (grad_scale / count)) * (inverse * scale.astype(dtype))
    return grad_inputs.astype(inputs.dtype), grad_scale.astype(scale.dtype), grad_bias.astype(bias.dtype)


norm_relu.defvjp(_fwd, _bwd)
