"""Arrays of any library as NumPy's, in trees: what `fit` is given."""

import hashlib
from typing import Any

import jax
import numpy as np

from pspinal_jax.errors import DataError, UsageError


def to_batch(data: Any) -> Any:
    """(x, y) as NumPy arrays whose first axes agree."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise UsageError(f"data is of type {type(data).__name__}, expected (x, y) or batches of (x, y)")
    batch = to_numpy(data[0], "x"), to_numpy(data[1], "y")
    count_examples(batch, "(x, y)")
    return batch


def to_numpy(tree: Any, name: str) -> Any:
    """`tree` with a NumPy array of a type that JAX computes with for each of its leaves.

    Args:
      tree: an array or a frame (NumPy, JAX, PyTorch, pandas, polars), a list of numbers, or a tuple or dict of such.
      name: what it is called in errors.

    Raises:
      DataError: if a leaf does not hold numbers.
    """

    def one(leaf: Any) -> np.ndarray:
        if np.ma.is_masked(leaf):
            raise DataError(f"{name} holds {leaf.mask.sum()} masked values; fill them in or leave their examples out")
        array = np.asarray(leaf.detach().cpu() if hasattr(leaf, "detach") else leaf)
        if array.dtype.kind not in "biufc" and array.dtype != jax.numpy.bfloat16:
            raise DataError(f"{name} is of type {array.dtype}, expected numbers; turn text into numbers first")
        return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)

    return jax.tree.map(one, tree, is_leaf=lambda value: isinstance(value, list))


def count_examples(tree: Any, name: str) -> int:
    """The length of the first axis of all arrays in `tree`.

    Raises:
      DataError: if there is none, or they differ.
    """
    leaves = jax.tree.leaves(tree)
    lengths = {len(leaf) if leaf.ndim else -1 for leaf in leaves}
    if len(lengths) != 1 or -1 in lengths:
        shapes = ", ".join(str(leaf.shape) for leaf in leaves) or "none"
        raise DataError(f"{name} has arrays of shapes {shapes}, expected one first axis, of examples, for all")
    return lengths.pop()


def checksum(tree: Any) -> str:
    """A checksum of all arrays in `tree`, with their shapes and dtypes."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
