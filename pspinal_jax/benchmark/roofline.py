"""What a machine can do at best (its rate of products and of copies, measured), and what a function asks of it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pspinal_jax.benchmark.measurement import Case, Entry, Settings, has_torch, in_precisions
from pspinal_jax.benchmark.timing import Precision, layer_dtype, time_interleaved


def cases(settings: Settings) -> list[Case]:
    """What the machine can do at best, in JAX and in PyTorch."""

    def case(precision: Precision) -> list[Entry]:
        dtype = layer_dtype(precision)
        rates = measure_roofline(jnp.dtype(dtype)) | {"torch_flops_per_second": torch_product_rate(dtype)}
        return [{"kind": "peak", "precision": precision} | rates]

    return in_precisions(settings.precisions, case)


def measure_roofline(dtype: Any = jnp.float32) -> dict[str, Any]:
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


def torch_product_rate(dtype: str) -> float | None:
    """flops_per_second of PyTorch's product of the same matrices, None where torch is not installed."""
    if not has_torch():
        return None
    import torch

    from pspinal_jax.benchmark.torch_reference import torch_device

    place = torch_device()
    size = 2048 if place == "cpu" else 8192
    matrix = torch.randn(size, size, device=place).to(getattr(torch, dtype)) / size

    def products(count: int) -> None:
        value = matrix
        for _ in range(count):
            value = value @ matrix
        float(value[0, 0])  # waits for the device

    timing = time_interleaved({"products": products}, rounds=5)["products"]
    return 2 * size**3 / float(np.median(timing.seconds))


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Two for every multiplication and addition of a product or convolution in ``function(*args)``.

    What a loop repeats is counted once.

    Args:
      function: a function of arrays.
      args: arrays, or shapes as `jax.ShapeDtypeStruct`.
    """
    return sum(map(_flops, _equations(jax.make_jaxpr(function)(*args).jaxpr)))


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _flops(equation: Any) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    elif name == "conv_general_dilated":
        kernel, axes = equation.invars[1].aval, equation.params["dimension_numbers"].rhs_spec
        terms = math.prod(kernel.shape) // kernel.shape[axes[0]]
    else:
        return 0
    return 2 * terms * math.prod(equation.outvars[0].aval.shape)
