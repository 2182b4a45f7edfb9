"""A model's variables as one .safetensors file, in our own names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pspinal_jax.errors import DataError
from pspinal_jax.files import atomic_file

SEPARATOR = "/"


def save_variables(path: Path, variables: Mapping[str, Any]) -> None:
    """Write `variables` to `path` atomically.

    A tensor's name is its path, starting with the collection: ``params/head/layer_1/kernel``,
    ``batch_stats/backbone/stage_1/conv_1/norm/mean``. Shapes and dtypes are those of the leaves; kernels are [in, out]
    and HWIO. A collection without leaves is not in the file.

    Args:
      path: a .safetensors file; an existing one is overwritten.
      variables: collections of nested dicts of arrays, as from linen's ``init``.

    Raises:
      OSError: if it cannot be written.
    """
    from safetensors.numpy import save

    leaves = flatten_dict(dict(variables), sep=SEPARATOR)
    with atomic_file(path) as part:
        # safetensors writes the memory as it lies, whatever the strides.
        part.write_bytes(save({name: np.asarray(jax.device_get(leaf), order="C") for name, leaf in leaves.items()}))


def read_variables(path: Path) -> dict[str, dict[str, Any]]:
    """Read the variables in a file of `save_variables` as NumPy arrays, ready for ``model.apply``.

    Example::

        >>> from pathlib import Path
        >>> from pspinal_jax.weights import read_variables
        >>> variables = read_variables(Path('export/params.safetensors'))  # doctest: +SKIP
        >>> variables['params']['head']['layer_1']['kernel'].shape  # doctest: +SKIP
        (784, 128)

    Raises:
      DataError: if the file is missing or damaged.
    """
    from safetensors.numpy import load_file

    try:
        tree: dict[str, dict[str, Any]] = unflatten_dict(load_file(path), sep=SEPARATOR)
    except Exception as error:  # a damaged file, dtypes that NumPy lacks, a name below that of a tensor
        raise DataError(f"{path} cannot be read as variables in a .safetensors file: {error}") from error
    return tree


def first_not_finite(variables: dict[str, Any]) -> str | None:
    """The name, with levels joined by "/", of the first array that holds NaN or infinity; None if all are finite."""
    for name, leaf in flatten_dict(variables, sep=SEPARATOR).items():
        if not np.isfinite(np.asarray(leaf)).all():
            return str(name)
    return None
