"""Photographs batch by batch, of which every process reads and decodes only the rows that lie on its devices."""

import contextlib
from collections.abc import Generator

import numpy as np
from jax.sharding import Mesh

from pspinal_jax.data.photos.photos import Photos
from pspinal_jax.data.photos.stream import stream
from pspinal_jax.training.chunk import Batch
from pspinal_jax.training.mesh import rows_here


def read_share(
    mesh: Mesh,
    photos: Photos,
    order: np.ndarray,
    shape: tuple[int, int],
    batch_size: int,
    *,
    first_batch: int = 0,
    workers: int = 0,
    pad: bool = False,
) -> Generator[tuple[Batch, int], None, None]:
    """The rows on the devices of this process (see `rows_here`) of the batches that `stream` would yield.

    Args:
      mesh: the devices.
      photos: what to read from.
      order: integers [M], numbers of photographs, the same on every process.
      shape: (H, W).
      batch_size: B over all devices.
      first_batch: number of the batch to begin with.
      workers: processes that read and decode; 0 for threads of this process.
      pad: fill a smaller last batch with zeros, to B.

    Yields:
      ((images, labels), n): rows for `shard_rows`, and how many examples the whole batch has, without padding.
    """
    whole, tail = divmod(len(order), batch_size)
    rows = rows_here(mesh, batch_size)
    tail_rows = (rows[rows < tail] if pad else rows_here(mesh, tail)) if tail else rows[:0]
    numbers = np.asarray(order[: whole * batch_size]).reshape(whole, batch_size)[first_batch:, rows].ravel()
    tail_numbers = np.asarray(order[whole * batch_size :])[tail_rows]
    # One stream is better than two, but its last batch cannot be the largest.
    together = len(tail_rows) <= len(rows)
    parts = [np.concatenate([numbers, tail_numbers])] if together else [numbers, tail_numbers]
    sizes = [batch_size] * (whole - first_batch) + [tail] * (tail > 0)
    with contextlib.ExitStack() as opened:
        batches = (
            batch
            for part, size in zip(parts, (len(rows), len(tail_rows)), strict=False)
            for batch in opened.enter_context(contextlib.closing(stream(photos, part, shape, size, workers=workers)))
        )
        empty = np.zeros((0, *shape, 3), np.uint8), np.zeros(0, np.int32)
        for size in sizes:
            batch = empty if size == tail and not len(tail_rows) else next(batches)
            yield (_filled(batch, len(rows)) if pad else batch), size


def _filled(batch: Batch, rows: int) -> Batch:
    images, labels = batch
    missing = rows - len(labels)
    return np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)]), np.pad(labels, (0, missing))
