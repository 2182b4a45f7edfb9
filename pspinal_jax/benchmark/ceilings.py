"""What this machine can do at best: its matrix-product rate and its copy bandwidth, measured."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pspinal_jax.benchmark.timing import time_interleaved


def measured_ceilings(dtype: jnp.dtype = jnp.float32) -> dict[str, float]:
    """flops_per_second of a large square matrix product, and bytes_per_second of a large copy (read and written)."""
    big = jax.default_backend() != "cpu"
    size = 8192 if big else 2048
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), dtype) / size
    vector = jnp.zeros((1 << 28) if big else (1 << 25), jnp.float32)

    @jax.jit
    def products(matrix: jax.Array, count: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, value: value @ matrix, matrix)

    @jax.jit
    def copies(vector: jax.Array, count: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, value: value + 1, vector)

    timings = time_interleaved(
        {
            "products": lambda count: jax.block_until_ready(products(matrix, np.int32(count))),
            "copies": lambda count: jax.block_until_ready(copies(vector, np.int32(count))),
        },
        rounds=5,
    )
    seconds = {name: float(np.median(timing.seconds)) for name, timing in timings.items()}
    return {
        "flops_per_second": 2 * size**3 / seconds["products"],
        "bytes_per_second": 2 * vector.nbytes / seconds["copies"],
    }
