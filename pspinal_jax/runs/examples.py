"""Training examples and evaluated splits as the loop sees them: on the devices, or read from files while it runs."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from pspinal_jax.data.arrays import Split
from pspinal_jax.data.photos.photos import Photos
from pspinal_jax.runs.lanes import Lanes
from pspinal_jax.runs.shares import read_share
from pspinal_jax.runs.stages import Stage
from pspinal_jax.training.chunk import Batch
from pspinal_jax.training.mesh import shard_rows
from pspinal_jax.training.programs import Programs, padded_split

Evaluate = Callable[[Batch, int], dict[str, np.ndarray]]
"""(padded batch or split, how many are real) -> sums loss and correct [K] and predictions [K, M], of K seeds."""
Advance = Callable[[int, int], None]
"""(first, steps): take so many steps of the epoch, from step `first` on, for every seed; returns when they are done."""


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

    def warm_up(self, lanes: Lanes, stage: Stage) -> None:
        """Compile what an epoch of `stage` calls; the states stay as they are."""

    def epoch(self, lanes: Lanes, stage: Stage, first: int) -> contextlib.AbstractContextManager[Advance]:
        """The epoch that `lanes` have planned, from step `first` on."""


class EvaluatedSplit(Protocol):
    """Examples to evaluate."""

    @property
    def count(self) -> int:
        """How many."""

    def evaluate(self, evaluate: Evaluate, before_call: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """Sums loss and correct [K] and predictions [K, count] over the split.

        `before_call` is called before each call of `evaluate`, and may raise to give up.
        """

    def warm_up(self, evaluate: Evaluate) -> None:
        """Compile the evaluation, by evaluating nothing."""


class ResidentExamples:
    """Examples that lie on the devices whole: a chunk of steps is one call."""

    first_chunk = 8
    waited = 0.0

    def __init__(self, programs: Programs, split: Split) -> None:
        self.count = len(split)
        self._data: Batch = programs.replicate((split.inputs, split.labels))

    def warm_up(self, lanes: Lanes, stage: Stage) -> None:
        """See `Examples`: calls the programs for no steps."""
        lanes.run_chunk(0, 0, self._data)
        if stage.tail_size:
            lanes.run_chunk(0, 0, self._data, tail_size=stage.tail_size)

    @contextlib.contextmanager
    def epoch(self, lanes: Lanes, stage: Stage, first: int) -> Iterator[Advance]:
        """See `Examples`."""

        def advance(first: int, steps: int) -> None:
            tail = stage.tail_size if first >= stage.whole_steps else 0
            lanes.run_chunk(first, steps, self._data, tail_size=tail)

        yield advance


class StreamedExamples:
    """Photographs that are decoded while the devices work on the batch before."""

    first_chunk = 1

    def __init__(self, programs: Programs, photos: Photos, side: int, batch_size: int, workers: int) -> None:
        self.count = len(photos)
        self.waited = 0.0
        self._programs, self._photos = programs, photos
        self._shape, self._batch_size, self._workers = (side, side), batch_size, workers

    def warm_up(self, lanes: Lanes, stage: Stage) -> None:
        """See `Examples`: takes a step on black pictures and forgets it."""
        for size in {self._batch_size, stage.tail_size} - {0}:
            batch = np.zeros((size, *self._shape, 3), np.uint8), np.zeros(size, np.int32)
            lanes.rehearse(self._programs.shard_batch(batch))

    @contextlib.contextmanager
    def epoch(self, lanes: Lanes, stage: Stage, first: int) -> Iterator[Advance]:
        """See `Examples`. Each seed reads its own order."""
        self.waited = 0.0
        used = stage.whole_steps * self._batch_size + stage.tail_size
        with contextlib.ExitStack() as opened:
            streams = [
                opened.enter_context(
                    contextlib.closing(
                        read_share(
                            self._programs.mesh,
                            self._photos,
                            order[:used],
                            self._shape,
                            self._batch_size,
                            first_batch=first,
                            workers=self._workers,
                        )
                    )
                )
                for order in lanes.orders()
            ]

            def advance(first: int, steps: int) -> None:
                for step in range(first, first + steps):
                    for index, batches in enumerate(streams):
                        lanes.run_batch(index, step, self._next(batches, lanes, index))
                lanes.block()

            yield advance

    def _next(self, batches: Iterator[tuple[Batch, int]], lanes: Lanes, index: int) -> Batch:
        start = time.perf_counter()
        batch, size = next(batches)
        if lanes.idle(index):
            self.waited += time.perf_counter() - start
        return shard_rows(self._programs.mesh, batch, size)


@dataclasses.dataclass(frozen=True)
class ResidentSplit:
    """A split on the devices: arrays padded to whole batches, and how many of their examples are real."""

    arrays: Batch
    count: int

    @classmethod
    def place(cls, programs: Programs, split: Split, batch_size: int) -> "ResidentSplit":
        """`split` on the devices, padded to whole batches."""
        return cls(programs.replicate(padded_split(split, batch_size)), len(split))

    def evaluate(self, evaluate: Evaluate, before_call: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """See `EvaluatedSplit`."""
        before_call()
        sums = evaluate(self.arrays, self.count)
        return sums | {"predictions": sums["predictions"][:, : self.count]}

    def warm_up(self, evaluate: Evaluate) -> None:
        """See `EvaluatedSplit`."""
        evaluate(self.arrays, 0)


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """Photographs that are decoded as they are evaluated, batch by batch; the last batch is padded and masked."""

    programs: Programs
    photos: Photos
    side: int
    batch_size: int
    workers: int

    @property
    def count(self) -> int:
        """How many."""
        return len(self.photos)

    def evaluate(self, evaluate: Evaluate, before_call: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """See `EvaluatedSplit`."""
        parts = []
        mesh, order, shape = self.programs.mesh, np.arange(self.count), (self.side, self.side)
        with contextlib.closing(
            read_share(mesh, self.photos, order, shape, self.batch_size, workers=self.workers, pad=True)
        ) as batches:
            for batch, size in batches:
                before_call()
                sums = evaluate(shard_rows(mesh, batch, self.batch_size), size)
                parts.append(sums | {"predictions": sums["predictions"][:, :size]})
        return {
            "loss": np.sum([part["loss"] for part in parts], axis=0),
            "correct": np.sum([part["correct"] for part in parts], axis=0),
            "predictions": np.concatenate([part["predictions"] for part in parts], axis=1),
        }

    def warm_up(self, evaluate: Evaluate) -> None:
        """See `EvaluatedSplit`."""
        batch = np.zeros((self.batch_size, self.side, self.side, 3), np.uint8), np.zeros(self.batch_size, np.int32)
        evaluate(self.programs.shard_batch(batch), 0)
