"""Batch norm per device: each device normalises its own share of a batch, as data-parallel training once did.

A jitted step over a cut batch is the step on the whole batch: XLA inserts the exchanges that its means need, so batch
norm sees all B rows, whatever the number of devices. That is the default. In a step that is written for one device and
mapped over D of them (`jax.shard_map`, before it `jax.pmap`; PyTorch's DistributedDataParallel does the same), batch
norm sees the device's own B / D rows, unless its means are exchanged by hand. That saves two small exchanges a layer
and makes the statistics noisier, so the result depends on the number of devices.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from pspinal_jax.training.mesh import BATCH
from pspinal_jax.training.state import Totals, TrainState


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
