"""The devices as a mesh with named axes, and what is spread over it whatever the model: batches and copies.

Three axes, always, some of them of length 1:

  data   each device has its share of a batch, and all of the parameters
  fsdp   each device has its share of a batch, and its share of the parameters and of the optimiser's state
  model  the devices share a batch's rows, and each has its share of the classes (see partition.py)
"""

# DOC of training/partition: """Which axis of a parameter, or of what the optimiser keeps beside it, is cut over which axis of the mesh.  # noqa: E501
#
# A rule of path and shape, and not linen's partitioning metadata: `nn.with_partitioning` puts a box (`nn.Partitioned`)
# around every array that ``init`` returns, so that whoever uses a head by itself would find boxes where the documented
# tree has arrays, and would have to unbox them to count, convert, save or compare. The rule asks nothing of the
# model. It
# covers momenta and averages, whose paths end as their parameters' do, and whatever backbone stands below the head.
# """

# DOC of training/replicas: """Batch norm per device: each device normalises its own share of a batch, as data-parallel training once did.  # noqa: E501
#
# A jitted step over a cut batch is the step on the whole batch: XLA inserts the exchanges that its means need, so batch
# norm sees all B rows, whatever the number of devices. That is the default. In a step that is written for one device
# and
# mapped over D of them (`jax.shard_map`, before it `jax.pmap`; PyTorch's DistributedDataParallel does the same), batch
# norm sees the device's own B / D rows, unless its means are exchanged by hand. That saves two small exchanges a layer
# and makes the statistics noisier, so the result depends on the number of devices.
# """

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pspinal_jax.distributed.arrays import put
from pspinal_jax.errors import UsageError
from pspinal_jax.recipes.schema import MeshConfig
from pspinal_jax.training.state import Totals, TrainState

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


def num_batch_shards(config: MeshConfig) -> int:
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


LEAST_SIZE = 4096
"""Arrays of fewer entries are not cut over fsdp: there is nothing to save, and every cut array costs a message."""


def partition_spec(path: str, shape: tuple[int, ...], axes: Mapping[str, int]) -> PartitionSpec:
    """How one array is cut.

    The kernel [.., C] and the bias [C] of a head's output are cut over ``model`` along the classes, so that logits,
    their gradient and the softmax are cut there too. Over ``fsdp``, any array of `LEAST_SIZE` entries or more is cut
    along the longest axis that is left and divides evenly; none such, and it stays whole.

    Args:
      path: of the array in its tree, e.g. ``head/output/kernel`` or ``0/trace/head/output/kernel``.
      shape: its shape.
      axes: lengths of the mesh's axes by name; C must be a multiple of ``model``'s.

    Returns:
      A mesh axis, or None, for each axis of the array; empty where the array stays whole.
    """
    cuts: list[str | None] = [None] * len(shape)
    if axes["model"] > 1 and path.split("/")[-3:-1] == ["head", "output"]:
        cuts[-1] = "model"
    if axes["fsdp"] > 1 and math.prod(shape) >= LEAST_SIZE:
        free = [axis for axis, cut in enumerate(cuts) if cut is None and shape[axis] % axes["fsdp"] == 0]
        if free:
            cuts[max(free, key=lambda axis: shape[axis])] = "fsdp"
    return PartitionSpec(*cuts) if any(cuts) else PartitionSpec()


def shardings(mesh: Mesh, tree: Any, *, stacked: bool = False) -> Any:
    """The sharding of every array in `tree` by `partition`.

    Args:
      mesh: where they lie.
      tree: arrays or shapes: parameters, running statistics, an optimiser's state, or all of them.
      stacked: whether they have a leading axis of seeds, which is never cut.
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        cuts = partition_spec(name, leaf.shape[1:] if stacked else leaf.shape, mesh.shape)
        return NamedSharding(mesh, PartitionSpec(None, *cuts) if stacked and cuts else cuts)

    return jax.tree_util.tree_map_with_path(one, tree)


def shards_parameters(mesh: Mesh) -> bool:
    """Whether parameters are cut at all over `mesh`, or lie on every device whole."""
    return mesh.shape["fsdp"] * mesh.shape["model"] > 1


def per_device(mesh: Mesh, step: Callable[..., tuple[TrainState, Totals]]) -> Callable[..., tuple[TrainState, Totals]]:
    """A training step in which batch norm sees each device's share of the batch alone.

    Args:
      mesh: the devices; the parameters lie on each of them whole.
      step: `train_step` with its model and optimiser.

    Returns:
      (state, totals, batch, learning_rate, key) -> (state, totals), to be jitted.
    """
    whole = PartitionSpec()

    def mapped(*arguments: Any) -> tuple[TrainState, Totals]:
        return step(*arguments, axes=BATCH[0])

    in_specs = (whole, whole, BATCH, whole, whole)
    return jax.shard_map(mapped, mesh=mesh, in_specs=in_specs, out_specs=(whole, whole))
