"""Images that are read and decoded while the devices work on the batch before.

Every process decodes only its process-local rows: those that lie on its devices.
"""

import contextlib
from collections.abc import Generator

import jax
import numpy as np
from jax.sharding import Mesh

from pspinal_jax.data.dataset import Split
from pspinal_jax.data.stream import stream
from pspinal_jax.training.examples import BatchedExamples, EvaluatedSplit, zeros
from pspinal_jax.training.programs import Programs, SeedStates
from pspinal_jax.training.sharding import process_local_rows, shard_process_local
from pspinal_jax.training.stages import TrainingStage
from pspinal_jax.training.step import Batch


def streaming_examples(programs: Programs, split: Split, side: int, workers: int, crops: bool) -> BatchedExamples:
    """Images to train on. Each seed reads its own order; with `crops` they are cropped anew in every epoch."""

    def epoch(seed_states: SeedStates, stage: TrainingStage, first: int) -> Generator[list[Batch], None, None]:
        used = stage.whole_steps * programs.batch_size + stage.tail_size
        with contextlib.ExitStack() as opened:
            streams = []
            for seed, order in zip(seed_states.seeds, seed_states.orders(), strict=True):
                cropped = split.random_crop(seed, seed_states.epoch) if crops else split
                local = process_local_batches(
                    programs.mesh,
                    cropped,
                    order[:used],
                    (side, side),
                    programs.batch_size,
                    first_batch=first,
                    workers=workers,
                )
                streams.append(opened.enter_context(contextlib.closing(local)))
            for batches in zip(*streams, strict=True):
                yield [shard_process_local(programs.mesh, batch, size) for batch, size in batches]

    return BatchedExamples(programs, len(split), _example(side), epoch)


def streaming_split(programs: Programs, split: Split, side: int, workers: int) -> EvaluatedSplit:
    """Images to evaluate, batch by batch; the last batch is padded and masked."""
    mesh, size = programs.mesh, programs.eval_batch_size

    def batches() -> Generator[tuple[Batch, int], None, None]:
        order = np.arange(len(split))
        local = process_local_batches(mesh, split, order, (side, side), size, workers=workers, pad=True)
        with contextlib.closing(local):
            for batch, count in local:
                yield shard_process_local(mesh, batch, size), count

    return EvaluatedSplit(split.labels, len(split), batches, lambda: programs.shard_batch(zeros(_example(side), size)))


def _example(side: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((side, side, 3), np.uint8), jax.ShapeDtypeStruct((), np.int32)


def process_local_batches(
    mesh: Mesh,
    split: Split,
    order: np.ndarray,
    shape: tuple[int, int],
    batch_size: int,
    *,
    first_batch: int = 0,
    workers: int = 0,
    pad: bool = False,
) -> Generator[tuple[Batch, int], None, None]:
    """The rows on the devices of this process (see `process_local_rows`) of batches of B examples, read ahead of use.

    Args:
      mesh: the devices.
      split: what to read from.
      order: integers [M], numbers of examples, the same on every process.
      shape: (H, W).
      batch_size: B over all devices; the last batch holds what is left.
      first_batch: number of the batch to begin with; what comes before it is not read.
      workers: processes that read and decode; 0 for threads of this process.
      pad: fill a smaller last batch with zeros, to B.

    Yields:
      ((images, labels), n): rows for `shard_process_local`, and how many examples the whole batch has, without padding.
    """
    starts = range(first_batch * batch_size, len(order), batch_size)
    batches = [order[start : start + batch_size] for start in starts]
    rows = {size: process_local_rows(mesh, batch_size if pad else size) for size in {*map(len, batches)}}
    numbers = [batch[rows[len(batch)][rows[len(batch)] < len(batch)]] for batch in batches]
    with contextlib.closing(stream(split, numbers, shape, workers)) as read:
        for (images, labels), size in zip(read, map(len, batches), strict=True):
            missing = len(rows[size]) - len(labels)
            padding = [(0, missing), (0, 0), (0, 0), (0, 0)]
            yield ((np.pad(images, padding), np.pad(labels, (0, missing))) if missing else (images, labels)), size
