"""What a product's operands are rounded to, set alike for JAX and for PyTorch.

An accelerator multiplies float32 in several ways, and the two libraries choose differently by default. A comparison is
of the same arithmetic only if both are told:

- float32: full float32 products;
- tf32: float32 arrays whose products round their operands to TF32 (10 bits of fraction), on GPUs that have it;
- bfloat16: layers compute in bfloat16; what stays float32 may use TF32.
"""

from collections.abc import Sequence
from typing import Literal

import jax

Precision = Literal["float32", "tf32", "bfloat16"]
_IN_JAX = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "tensorfloat32"}


def usual_precisions() -> Sequence[Precision]:
    """Those that this machine tells apart: a CPU has no TF32."""
    return ("float32", "bfloat16") if jax.default_backend() == "cpu" else ("float32", "tf32", "bfloat16")


def set_precision(precision: Precision) -> None:
    """Set the products of this process, JAX's and (where it is installed) PyTorch's."""
    jax.config.update("jax_default_matmul_precision", _IN_JAX[precision])
    try:
        import torch
    except ImportError:
        return
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.backends.cudnn.benchmark = True  # as XLA, which tries a convolution's algorithms too


def layer_dtype(precision: Precision) -> Literal["float32", "bfloat16"]:
    """The dtype that layers compute in."""
    return "bfloat16" if precision == "bfloat16" else "float32"
