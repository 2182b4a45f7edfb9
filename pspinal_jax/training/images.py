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
    mesh, size = programs.mesh, programs.batch_size

    def epoch(seed_states: SeedStates, stage: TrainingStage, first: int) -> Generator[list[Batch], None, None]:
        visited = seed_states.orders()[:, first * size : stage.whole_steps * size + stage.tail_size]
        with contextlib.ExitStack() as opened:
            streams = []
            for seed, order in zip(seed_states.seeds, visited, strict=True):
                cropped = split.random_crop(seed, seed_states.epoch) if crops else split
                local = process_local_batches(mesh, cropped, order, side, size, workers=workers)
                streams.append(opened.enter_context(contextlib.closing(local)))
            for batches in zip(*streams, strict=True):
                yield [shard_process_local(mesh, batch, rows) for batch, rows in batches]

    return BatchedExamples(programs, len(split), _example(side), epoch)


def streaming_split(programs: Programs, split: Split, side: int, workers: int) -> EvaluatedSplit:
    """Images to evaluate, batch by batch; the last batch is padded and masked."""
    mesh, size = programs.mesh, programs.eval_batch_size

    def batches() -> Generator[tuple[Batch, int], None, None]:
        local = process_local_batches(mesh, split, np.arange(len(split)), side, size, workers=workers, pad=True)
        with contextlib.closing(local):
            for batch, count in local:
                yield shard_process_local(mesh, batch, size), count

    return EvaluatedSplit(split.labels, len(split), batches, lambda: programs.shard_batch(zeros(_example(side), size)))


def _example(side: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((side, side, 3), np.uint8), jax.ShapeDtypeStruct((), np.int32)


def process_local_batches(
    mesh: Mesh, split: Split, order: np.ndarray, side: int, batch_size: int, *, workers: int = 0, pad: bool = False
) -> Generator[tuple[Batch, int], None, None]:
    """The rows on the devices of this process (see `process_local_rows`) of batches of B examples, read ahead of use.

    Args:
      mesh: the devices.
      split: what to read from.
      order: integers [M], numbers of examples, the same on every process.
      side: of the square images, in pixels.
      batch_size: B over all devices; the last batch holds what is left.
      workers: processes that read and decode; 0 for threads of this process.
      pad: fill a smaller last batch with zeros, to B.

    Yields:
      ((images, labels), n): rows for `shard_process_local`, and how many examples the whole batch has, without padding.
    """
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rows = {size: process_local_rows(mesh, batch_size if pad else size) for size in {*map(len, batches)}}
    numbers = [batch[rows[len(batch)][rows[len(batch)] < len(batch)]] for batch in batches]
    with contextlib.closing(stream(split, numbers, (side, side), workers)) as read:
        for (images, labels), size in zip(read, map(len, batches), strict=True):
            missing = len(rows[size]) - len(labels)
            padding = [(0, missing), (0, 0), (0, 0), (0, 0)]
            yield ((np.pad(images, padding), np.pad(labels, (0, missing))) if missing else (images, labels)), size
