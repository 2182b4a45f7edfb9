"""Floating-point operations of matrix products and convolutions, counted in a traced function."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


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
