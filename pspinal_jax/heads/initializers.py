"""torch.nn.Linear's default initialisation, which the published scripts rely on."""

import jax
import jax.numpy as jnp

Initializer = jax.nn.initializers.Initializer


def torch_linear_init(fan_in: int) -> Initializer:
    """Uniform in ±1/sqrt(fan_in), for the kernel and the bias alike (SpinalNet scripts; torch.nn.Linear).

    Args:
      fan_in: number of inputs of the linear layer, at least 1.

    Returns:
      An initializer ``(key, shape, dtype) -> array``.
    """
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
