"""The devices as a mesh with named axes, and what is spread over it whatever the model: batches and copies.

Three axes, always, some of them of length 1:

  data   each device has its share of a batch, and all of the parameters
  fsdp   each device has its share of a batch, and its share of the parameters and of the optimiser's state
  model  the devices share a batch's rows, and each has its share of the classes (see partition.py)
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pspinal_jax.errors import UsageError
from pspinal_jax.processes.arrays import put
from pspinal_jax.recipes.schema import MeshConfig

AXES = ("data", "fsdp", "model")
BATCH = PartitionSpec(("data", "fsdp"))
"""How a batch's first axis is cut."""


ALL_DATA = MeshConfig()
"""All devices on the axis data."""


def make_mesh(config: MeshConfig = ALL_DATA) -> Mesh:
    """The mesh of all devices that `config` describes; raises as `mesh_shape`."""
    # Explicit axes, JAX's default, would make shardings part of every array's type; here XLA propagates them.
    return jax.make_mesh(mesh_shape(config, jax.device_count()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Lengths of the axes data, fsdp and model over so many devices.

    Raises:
      UsageError: if their product is not the number of devices.
    """
    shared = config.fsdp * config.model
    data = devices // shared if config.data == -1 else config.data
    if data * shared != devices:
        expected = f"divisors of {devices}" if config.data == -1 else f"a product of {devices}"
        raise UsageError(
            f"mesh is data {config.data} x fsdp {config.fsdp} x model {config.model}, expected {expected}, the number "
            "of devices; change --mesh.data (-1: all that the others leave), --mesh.fsdp or --mesh.model"
        )
    return data, config.fsdp, config.model


def batch_shares(config: MeshConfig) -> int:
    """Into how many parts a batch is cut; raises as `mesh_shape`."""
    return math.prod(mesh_shape(config, jax.device_count())[:2])


def replicated_on(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device of `mesh` holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """How a batch of `size` examples lies: its first axis cut, or on each device whole where that is not even."""
    fits = size % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    return NamedSharding(mesh, BATCH) if fits else replicated_on(mesh)


def shard_over(mesh: Mesh, tree: Any) -> Any:
    """Host arrays, whole on every process, with their first axis as `batch_sharding` says."""
    return jax.tree.map(lambda array: put(array, batch_sharding(mesh, len(array))), tree)


def rows_here(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of `size` examples lie on this process's devices: integers, increasing."""
    places = batch_sharding(mesh, size).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in places]))


def shard_rows(mesh: Mesh, tree: Any, size: int) -> Any:
    """The batch of `size` examples of which every process gives the rows `rows_here`, as `batch_sharding` says."""
    sharding, rows = batch_sharding(mesh, size), rows_here(mesh, size)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return array[np.searchsorted(rows, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return shard_over(mesh, tree) if len(rows) == size else jax.tree.map(place, tree)
