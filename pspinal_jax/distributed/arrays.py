"""Arrays on a mesh that spans processes: from the host onto it, and back."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from pspinal_jax.distributed.coordination import count

_BLOCK_BYTES = 2**26


def put(tree: Any, shardings: Any) -> Any:
    """`jax.device_put`, but from host arrays that every process holds whole each device gets its part, unasked.

    (Across processes `jax.device_put` sends all of a host array around to check that it is the same everywhere.)

    Args:
      tree: arrays, on the host or on devices.
      shardings: one for all, or a tree of them.
    """
    if count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda leaf: _put(leaf, shardings), tree)
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    array = np.asarray(leaf)
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    return jax.make_array_from_callback(array.shape, sharding, lambda place: array[place])


def whole(array: Any) -> np.ndarray:
    """All of `array` on the host of every process, wherever its parts lie; all processes call it."""
    if not _lies_elsewhere(array):
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def rows_of(array: Any) -> Any:
    """Yield `array` in blocks of its first axis, on the host of every process; all processes go through it.

    An array of which a part lies on other processes is not put together on any device: no block is much larger than
    64 MiB, or one row.
    """
    if not _lies_elsewhere(array):
        yield np.asarray(array)
        return
    rows = max(1, _BLOCK_BYTES // max(1, array.nbytes // len(array)))
    for start in range(0, len(array), rows):
        yield whole(jax.lax.slice_in_dim(array, start, min(start + rows, len(array))))


def _lies_elsewhere(array: Any) -> bool:
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return False
    here = {str(shard.index): shard.data.size for shard in array.addressable_shards}
    return sum(here.values()) < array.size
