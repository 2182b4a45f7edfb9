"""Which axis of a parameter, or of what the optimiser keeps beside it, is cut over which axis of the mesh.

A rule of path and shape, and not linen's partitioning metadata: `nn.with_partitioning` puts a box (`nn.Partitioned`)
around every array that ``init`` returns, so that whoever uses a head by itself would find boxes where the documented
tree has arrays, and would have to unbox them to count, convert, save or compare. The rule asks nothing of the model. It
covers momenta and averages, whose paths end as their parameters' do, and whatever backbone stands below the head.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LEAST_SIZE = 4096
"""Arrays of fewer entries are not cut over fsdp: there is nothing to save, and every cut array costs a message."""


def partition(path: str, shape: tuple[int, ...], axes: Mapping[str, int]) -> PartitionSpec:
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
        cuts = partition(name, leaf.shape[1:] if stacked else leaf.shape, mesh.shape)
        return NamedSharding(mesh, PartitionSpec(None, *cuts) if stacked and cuts else cuts)

    return jax.tree_util.tree_map_with_path(one, tree)


def cuts_parameters(mesh: Mesh) -> bool:
    """Whether parameters are cut at all over `mesh`, or lie on every device whole."""
    return mesh.shape["fsdp"] * mesh.shape["model"] > 1
