"""torch.nn.Linear's default initialisation, which the published scripts rely on."""

from typing import Any

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

    def init(key: jax.Array, shape: Any, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        values = jax.random.uniform(key, shape, dtype or jnp.float32, -bound, bound)
        return values if out_sharding is None else jax.lax.with_sharding_constraint(values, out_sharding)

    return init
