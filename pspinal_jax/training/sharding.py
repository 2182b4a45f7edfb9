"""The devices as a mesh with named axes, and how batches and parameters are sharded over it.

Three axes, always, some of them of length 1:

  data   each device has its part of a batch, and all of the parameters
  fsdp   each device has its part of a batch, and its part of the parameters and of the optimiser's state
  model  the devices see the same rows of a batch, and each has its part of the classes

Parameters are sharded by a rule of path and shape (`partition_spec`) and not by linen's partitioning metadata:
`nn.with_partitioning` puts a box (`nn.Partitioned`) around every array that ``init`` returns, and whoever uses a head
by itself would have to unbox them to count, convert, save or compare. The rule asks nothing of the model. It covers
momenta and averages, whose paths end as their parameters' do, and whatever backbone stands below the head.

A jitted step over a sharded batch is the step on the whole batch: XLA inserts the exchanges that its means need, so
batch norm sees all B rows, whatever the number of devices. That is the default. `per_device` instead maps a step that
is written for one device over D of them, as data-parallel training once did (`jax.pmap`; PyTorch's
DistributedDataParallel): batch norm sees the device's own B / D rows. That saves two small exchanges a layer and makes
the statistics noisier, so the result depends on the number of devices.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pspinal_jax.distributed import put
from pspinal_jax.errors import UsageError
from pspinal_jax.training.state import EpochMetrics, Step, TrainState

AXES = ("data", "fsdp", "model")
BATCH = PartitionSpec(("data", "fsdp"))
"""How a batch's first axis is sharded."""


def make_mesh() -> Mesh:
    """The mesh of all devices on the axis data."""
    return _mesh_of((jax.device_count(), 1, 1))


def fit_mesh(data: int, fsdp: int, model: int, *, rows: int, least: int = 1, resuming: bool = False) -> Mesh:
    """A mesh with axes of these lengths at which batches divide over the devices, if need be of fewer devices.

    Args:
      data: length of the axis data; -1 for the largest at which `rows` divide over the devices.
      fsdp: length of the axis fsdp.
      model: length of the axis model.
      rows: examples that the devices work on at a time.
      least: the fewest of them for a device.
      resuming: take the lengths as the largest allowed, whatever the number of devices.

    Returns:
      The mesh. Where no length of data will do, all devices: each then has a batch whole, see `batch_sharding`.

    Raises:
      UsageError: as `mesh_shape`, unless `resuming`.
    """
    devices = jax.device_count()
    if resuming:
        model = _largest_divisor(model, devices)
        fsdp = _largest_divisor(fsdp, devices // model)
        longest = devices // (fsdp * model)
        longest = longest if data == -1 else min(data, longest)
    else:
        longest = mesh_shape(data, fsdp, model, devices)[0]
    for length in range(longest, 0, -1) if resuming or data == -1 else (longest,):
        each, rest = divmod(rows, length * fsdp)
        if not rest and each >= least and _devices_of((length, fsdp, model)) is not None:
            return _mesh_of((length, fsdp, model))
    whole = (longest, fsdp, model)
    return _mesh_of(whole if _devices_of(whole) is not None else (devices, 1, 1))


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _mesh_of(shape: tuple[int, int, int]) -> Mesh:
    # Explicit axes, JAX's default, would make shardings part of every array's type; here XLA propagates them.
    types = (AxisType.Auto,) * len(AXES)
    if math.prod(shape) == jax.device_count():
        return jax.make_mesh(shape, AXES, axis_types=types)
    return Mesh(np.asarray(_devices_of(shape)).reshape(shape), AXES, axis_types=types)


def _devices_of(shape: tuple[int, int, int]) -> list[jax.Device] | None:
    """As many devices as `shape` has places, the same number of every process; None if there are no such."""
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    if math.prod(shape) == jax.device_count():
        return jax.devices()
    each, rest = divmod(math.prod(shape), len(by_process))
    if rest or not each or each > min(map(len, by_process.values())):
        return None
    return [device for devices in by_process.values() for device in devices[:each]]


def mesh_shape(data: int, fsdp: int, model: int, devices: int) -> tuple[int, int, int]:
    """Lengths of the axes data (-1: what the others leave), fsdp and model over so many devices.

    Raises:
      UsageError: if their product is not the number of devices.
    """
    length = devices // (fsdp * model) if data == -1 else data
    if length * fsdp * model != devices:
        expected = f"divisors of {devices}" if data == -1 else f"a product of {devices}"
        raise UsageError(
            f"mesh is data {data} x fsdp {fsdp} x model {model}, expected {expected}, the number of devices; change "
            "--mesh.data (-1: all that the others leave), --mesh.fsdp or --mesh.model"
        )
    return length, fsdp, model


def num_batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is sharded into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def divisible_size(mesh: Mesh, size: int) -> int:
    """`size` rounded up to a multiple of the parts that a batch is sharded into."""
    return size + -size % num_batch_shards(mesh)


def replicated_on(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device of `mesh` holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """The sharding of a batch of `size` examples: along its first axis, or whole on each device if that is uneven."""
    return NamedSharding(mesh, BATCH) if size % num_batch_shards(mesh) == 0 else replicated_on(mesh)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Host arrays, whole on every process, with their first axis as `batch_sharding` says."""
    return jax.tree.map(lambda array: put(array, batch_sharding(mesh, len(array))), batch)


def process_local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of `size` examples lie on this process's devices: integers, increasing."""
    places = batch_sharding(mesh, size).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in places]))


def shard_process_local(mesh: Mesh, batch: Any, size: int) -> Any:
    """The batch of `size` examples of which every process gives its `process_local_rows`, as `batch_sharding` says."""
    sharding = batch_sharding(mesh, size)

    def place(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, rows, (size, *rows.shape[1:]))

    return jax.tree.map(place, batch)


MIN_SHARDED_SIZE = 4096
"""Smaller arrays are not sharded over fsdp: there is nothing to save, and every sharded array costs a message."""


def partition_spec(path: str, shape: tuple[int, ...], axes: Mapping[str, int]) -> PartitionSpec:
    """How one array is sharded.

    The kernel [.., C] and the bias [C] of a head's output are sharded over ``model`` along the classes, so that logits,
    their gradient and the softmax are sharded there too. Over ``fsdp``, any array of `MIN_SHARDED_SIZE` entries or
    more is sharded along the longest axis that is left and divides evenly; none such, and it stays whole.

    Args:
      path: of the array in its tree, e.g. ``head/output/kernel`` or ``0/trace/head/output/kernel``.
      shape: its shape.
      axes: lengths of the mesh's axes by name; C must be a multiple of ``model``'s.

    Returns:
      A mesh axis, or None, for each axis of the array; empty where the array stays whole.
    """
    spec: list[str | None] = [None] * len(shape)
    if axes["model"] > 1 and path.split("/")[-3:-1] == ["head", "output"]:
        spec[-1] = "model"
    if axes["fsdp"] > 1 and math.prod(shape) >= MIN_SHARDED_SIZE:
        free = [index for index, axis in enumerate(spec) if axis is None and shape[index] % axes["fsdp"] == 0]
        if free:
            spec[max(free, key=lambda index: shape[index])] = "fsdp"
    return PartitionSpec(*spec) if any(spec) else PartitionSpec()


def shardings(mesh: Mesh, tree: Any, *, stacked: bool = False) -> Any:
    """The sharding of every array in `tree`, see `partition_spec`.

    Args:
      mesh: where they lie.
      tree: arrays or shapes: parameters, running statistics, an optimiser's state, or all of them.
      stacked: whether they have a leading axis of seeds, which is never sharded.
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = partition_spec(name, leaf.shape[1:] if stacked else leaf.shape, mesh.shape)
        return NamedSharding(mesh, PartitionSpec(None, *spec) if stacked and spec else spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def shards_parameters(mesh: Mesh) -> bool:
    """Whether parameters are sharded over `mesh` at all, or lie on every device whole."""
    return mesh.shape["fsdp"] * mesh.shape["model"] > 1


def per_device(mesh: Mesh, step: Step) -> Step:
    """A training step in which batch norm sees each device's part of the batch alone.

    Args:
      mesh: the devices; the parameters lie on each of them whole.
      step: `TrainStep.descend`.

    Returns:
      (state, totals, batch, learning_rate, key) -> (state, totals), to be jitted.
    """
    whole = PartitionSpec()

    def mapped(*arguments: Any) -> tuple[TrainState, EpochMetrics]:
        return step(*arguments, axes=BATCH[0])

    in_specs = (whole, whole, BATCH, whole, whole)
    return jax.shard_map(mapped, mesh=mesh, in_specs=in_specs, out_specs=(whole, whole))
