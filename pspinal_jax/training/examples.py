"""Training examples and evaluated splits as the loop sees them: on the devices, or read from files while it runs.

Of images that are read, every process decodes only its process-local rows: those that lie on its devices.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from pspinal_jax.data.dataset import Split
from pspinal_jax.data.stream import stream
from pspinal_jax.training.programs import Chunk, Programs, SeedStates, padded_split
from pspinal_jax.training.sharding import process_local_rows, shard_process_local
from pspinal_jax.training.stages import TrainingStage
from pspinal_jax.training.step import Batch, count_rows

Evaluate = Callable[[Batch, int], dict[str, np.ndarray]]
"""(padded batch or split, how many are real) -> sums of loss and metrics [K] and predictions [K, M], of K seeds."""
ChunkSteps = Callable[[int], int]
"""(remaining whole steps of the epoch) -> how many of them the next chunk may have."""


class Examples(Protocol):
    """Training examples.

    Attributes:
      count: how many.
      first_chunk: steps to take at first, before it is known how many fit between two looks at the clock.
      waited: seconds of the epoch in which the devices may have waited for input (an upper bound).
    """

    count: int
    first_chunk: int
    waited: float

    def warm_up(self, seed_states: SeedStates, stage: TrainingStage) -> None:
        """Compile what an epoch of `stage` calls; the states stay as they are."""

    def chunks(
        self, seed_states: SeedStates, stage: TrainingStage, first: int, steps: ChunkSteps
    ) -> Generator[Chunk, None, None]:
        """The epoch that `seed_states` have planned, from step `first` on; to be closed."""


class EvaluatedSplit(Protocol):
    """Examples to evaluate."""

    @property
    def count(self) -> int:
        """How many."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [count]."""

    def evaluate(self, evaluate: Evaluate, before_call: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """Sums of loss and metrics [K], and predictions [K, count], over the split.

        `before_call` is called before each call of `evaluate`, and may raise to give up.
        """

    def warm_up(self, evaluate: Evaluate) -> None:
        """Compile the evaluation, by evaluating nothing."""


class InMemoryExamples:
    """Examples that lie on the devices whole: a chunk of steps is one call."""

    first_chunk = 8
    waited = 0.0

    def __init__(self, programs: Programs, arrays: Batch) -> None:
        self.count = count_rows(arrays)
        self._data: Batch = programs.replicate(arrays)

    def warm_up(self, seed_states: SeedStates, stage: TrainingStage) -> None:
        """See `Examples`: calls the programs for no steps."""
        seed_states.run(Chunk(0, 0, self._data))
        if stage.tail_size:
            seed_states.run(Chunk(0, 0, self._data, stage.tail_size))

    def chunks(
        self, seed_states: SeedStates, stage: TrainingStage, first: int, steps: ChunkSteps
    ) -> Generator[Chunk, None, None]:
        """See `Examples`."""
        for start, count in _cut(stage, first, steps):
            yield Chunk(start, count, self._data, stage.tail_size if start >= stage.whole_steps else 0)


class StreamingExamples:
    """Images that are decoded while the devices work on the batch before."""

    first_chunk = 1

    def __init__(
        self, programs: Programs, split: Split, side: int, batch_size: int, workers: int, moves: bool = False
    ) -> None:
        """With `moves` the images are `placed` anew in every epoch."""
        self._moves = moves
        self.count = len(split)
        self.waited = 0.0
        self._programs, self._split = programs, split
        self._shape, self._batch_size, self._workers = (side, side), batch_size, workers

    def warm_up(self, seed_states: SeedStates, stage: TrainingStage) -> None:
        """See `Examples`: takes a step on black images and forgets it."""
        for size in {self._batch_size, stage.tail_size} - {0}:
            batch = np.zeros((size, *self._shape, 3), np.uint8), np.zeros(size, np.int32)
            seed_states.compile_step(self._programs.shard_batch(batch))

    def chunks(
        self, seed_states: SeedStates, stage: TrainingStage, first: int, steps: ChunkSteps
    ) -> Generator[Chunk, None, None]:
        """See `Examples`. Each seed reads its own order."""
        self.waited = 0.0
        used = stage.whole_steps * self._batch_size + stage.tail_size
        with contextlib.ExitStack() as opened:
            streams = [
                opened.enter_context(
                    contextlib.closing(
                        process_local_batches(
                            self._programs.mesh,
                            self._split.random_crop(seed, seed_states.epoch) if self._moves else self._split,
                            order[:used],
                            self._shape,
                            self._batch_size,
                            first_batch=first,
                            workers=self._workers,
                        )
                    )
                )
                for seed, order in zip(seed_states.seeds, seed_states.orders(), strict=True)
            ]

            def next_step() -> Iterator[Batch]:
                return (self._next(batches, seed_states, index) for index, batches in enumerate(streams))

            for start, count in _cut(stage, first, steps):
                yield Chunk(start, count, batches=(next_step() for _ in range(count)))

    def _next(self, batches: Iterator[tuple[Batch, int]], seed_states: SeedStates, index: int) -> Batch:
        start = time.perf_counter()
        batch, size = next(batches)
        if seed_states.idle(index):
            self.waited += time.perf_counter() - start
        return shard_process_local(self._programs.mesh, batch, size)


def _cut(stage: TrainingStage, first: int, steps: ChunkSteps) -> Iterator[tuple[int, int]]:
    """(first step, steps) of the chunks of an epoch from step `first` on; the tail is a chunk of its own."""
    assert stage.steps_per_epoch is not None
    while first < stage.steps_per_epoch:
        count = steps(stage.whole_steps - first) or 1
        yield first, count
        first += count


@dataclasses.dataclass(frozen=True)
class InMemorySplit:
    """A split on the devices: arrays padded to whole batches, and the labels of the examples that are real."""

    arrays: Batch
    labels: Any
    count: int

    @classmethod
    def place(cls, programs: Programs, arrays: Batch, batch_size: int) -> "InMemorySplit":
        """The examples and labels `arrays` on the devices, padded to whole batches."""
        return cls(programs.replicate(padded_split(arrays, batch_size)), arrays[1], count_rows(arrays))

    def evaluate(self, evaluate: Evaluate, before_call: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """See `EvaluatedSplit`."""
        before_call()
        sums = evaluate(self.arrays, self.count)
        return sums | {"predictions": sums["predictions"][:, : self.count]}

    def warm_up(self, evaluate: Evaluate) -> None:
        """See `EvaluatedSplit`."""
        evaluate(self.arrays, 0)


@dataclasses.dataclass(frozen=True)
class StreamingSplit:
    """Images that are decoded as they are evaluated, batch by batch; the last batch is padded and masked."""

    programs: Programs
    split: Split
    side: int
    batch_size: int
    workers: int

    @property
    def count(self) -> int:
        """How many."""
        return len(self.split)

    @property
    def labels(self) -> np.ndarray:
        """See `EvaluatedSplit`."""
        return self.split.labels

    def evaluate(self, evaluate: Evaluate, before_call: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """See `EvaluatedSplit`."""
        parts = []
        mesh, order, shape = self.programs.mesh, np.arange(self.count), (self.side, self.side)
        with contextlib.closing(
            process_local_batches(mesh, self.split, order, shape, self.batch_size, workers=self.workers, pad=True)
        ) as batches:
            for batch, size in batches:
                before_call()
                sums = evaluate(shard_process_local(mesh, batch, self.batch_size), size)
                parts.append(sums | {"predictions": sums["predictions"][:, :size]})
        sums = {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0] if name != "predictions"}
        return sums | {"predictions": np.concatenate([part["predictions"] for part in parts], axis=1)}

    def warm_up(self, evaluate: Evaluate) -> None:
        """See `EvaluatedSplit`."""
        batch = np.zeros((self.batch_size, self.side, self.side, 3), np.uint8), np.zeros(self.batch_size, np.int32)
        evaluate(self.programs.shard_batch(batch), 0)


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
