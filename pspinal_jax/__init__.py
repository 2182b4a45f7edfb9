"""ProgressiveSpinalNet heads for JAX and Flax, with a compiled training path and the paper's recipes.

The names below are loaded on first use, so ``import pspinal_jax`` costs nothing and
``pspinal_jax.ProgressiveSpinalHead`` pulls in jax and flax only. `train` and `load_run` are the command line's Python
side, see `pspinal_jax.runs.run`; so is `compare`, see `pspinal_jax.comparison.api`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from pspinal_jax.comparison.api import compare
    from pspinal_jax.heads import (
        DenseHead,
        MLPHead,
        ProgressiveSpinalHead,
        SpinalHead,
        fuse_params,
        pack_batch_stats,
        pack_params,
        unfuse_params,
        unpack_batch_stats,
        unpack_params,
    )
    from pspinal_jax.runs.run import Run, load_run, train
    from pspinal_jax.training.fit import fit
    from pspinal_jax.training.fitted import Fit

# fmt: off
__all__ = [
    "DenseHead", "Fit", "MLPHead", "ProgressiveSpinalHead", "Run", "SpinalHead", "compare", "fit", "fuse_params",
    "load_run", "pack_batch_stats", "pack_params", "train", "unfuse_params", "unpack_batch_stats", "unpack_params",
]
# fmt: on
_ROOMS = {"Run": "runs.run", "load_run": "runs.run", "train": "runs.run", "compare": "comparison.api"}
_ROOMS |= {"Fit": "training.fitted", "fit": "training.fit"}


def __getattr__(name: str) -> Any:
    if name == "benchmark":  # `pspinal_jax.benchmark.step` without another import
        return import_module("pspinal_jax.benchmark")
    if name in __all__:
        return getattr(import_module(f"pspinal_jax.{_ROOMS.get(name, 'heads')}"), name)
    raise AttributeError(f"module 'pspinal_jax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
