"""Where batches come from, as the loop sees it: arrays on the devices, arrays on the host, or an iterable."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from numbers import Integral
from typing import Any

import jax
import numpy as np

from pspinal_jax.data.arrays import to_batch
from pspinal_jax.data.dataset import hold_out
from pspinal_jax.errors import UsageError
from pspinal_jax.training.programs import Chunk, Programs, SeedStates, padded_split
from pspinal_jax.training.stages import TrainingStage, make_stage
from pspinal_jax.training.step import Batch, count_rows

Evaluate = Callable[[Batch, int], dict[str, np.ndarray]]
"""(padded batch or split, how many are real) -> sums of loss and metrics [K] and predictions [K, M], of K seeds."""
ChunkSteps = Callable[[int], int]
"""(remaining whole steps of the epoch) -> how many of them the next chunk may have."""
Epoch = Callable[[SeedStates, TrainingStage, int], Generator[list[Batch], None, None]]
"""(planned seeds, stage, first step) -> the steps' batches of the epoch, on the devices, one for each seed."""


class InMemoryExamples:
    """Training examples that lie on the devices whole: a chunk of steps is one call.

    Attributes:
      count: how many.
      first_chunk: steps to take at first, before it is known how many fit between two looks at the clock.
      waited: seconds of the epoch in which the devices may have waited for input (an upper bound).
    """

    first_chunk = 8
    waited = 0.0

    def __init__(self, programs: Programs, arrays: Batch) -> None:
        self.count = count_rows(arrays)
        self._data: Batch = programs.replicate(arrays)

    def warm_up(self, seed_states: SeedStates, stage: TrainingStage) -> None:
        """Compile what an epoch of `stage` calls, by taking no steps; the states stay as they are."""
        for tail_size in dict.fromkeys((0, stage.tail_size)):
            seed_states.run(Chunk(0, 0, self._data, tail_size))

    def chunks(
        self, seed_states: SeedStates, stage: TrainingStage, first: int, steps: ChunkSteps
    ) -> Generator[Chunk, None, None]:
        """The epoch that `seed_states` have planned, from step `first` on; the tail is a chunk of its own."""
        assert stage.steps_per_epoch is not None
        while first < stage.steps_per_epoch:
            count = steps(stage.whole_steps - first) or 1
            yield Chunk(first, count, self._data, stage.tail_size if first >= stage.whole_steps else 0)
            first += count


class BatchedExamples:
    """Training examples that the host brings batch by batch, the next one while the devices work on the last one.

    Attributes:
      count: how many; 0 where only an epoch's end shows it.
      first_chunk: as of `InMemoryExamples`.
      waited: likewise.
    """

    first_chunk = 1

    def __init__(self, programs: Programs, count: int, example: Any, epoch: Epoch) -> None:
        """`example` holds shapes and dtypes of one example, and `epoch` gives an epoch's batches."""
        self.count, self.waited = count, 0.0
        self._programs, self._example, self._epoch = programs, example, epoch

    def warm_up(self, seed_states: SeedStates, stage: TrainingStage) -> None:
        """Compile what an epoch of `stage` calls, by taking a step on zeros and forgetting it."""
        for size in {self._programs.batch_size, stage.tail_size} - {0}:
            seed_states.compile_step(self._programs.shard_batch(zeros(self._example, size)))

    def chunks(
        self, seed_states: SeedStates, stage: TrainingStage, first: int, steps: ChunkSteps
    ) -> Generator[Chunk, None, None]:
        """As of `InMemoryExamples`; to be closed."""
        self.waited = 0.0
        with contextlib.closing(self._epoch(seed_states, stage, first)) as epoch:
            remaining = self._timed(epoch, seed_states)
            while (batches := next(remaining, None)) is not None:
                count = max(1, steps(stage.whole_steps - first))
                rest = itertools.islice(remaining, count - 1)
                yield Chunk(first, count, batches=itertools.chain([batches], rest))
                first += count

    def _timed(self, epoch: Iterator[list[Batch]], seed_states: SeedStates) -> Iterator[list[Batch]]:
        while True:
            start = time.perf_counter()
            batches = next(epoch, None)
            if batches is None:
                return
            if seed_states.idle():
                self.waited += time.perf_counter() - start
            yield batches


Examples = InMemoryExamples | BatchedExamples


@dataclasses.dataclass(frozen=True)
class EvaluatedSplit:
    """Examples to evaluate.

    Attributes:
      labels: of the examples, by index.
      count: how many.
      batches: gives all examples on the devices, in one or several padded batches, and how many of each are real.
      empty: gives a batch of the same shape, to compile with.
    """

    labels: Any
    count: int
    batches: Callable[[], Generator[tuple[Batch, int], None, None]]
    empty: Callable[[], Batch]

    @classmethod
    def in_memory(cls, programs: Programs, arrays: Batch) -> "EvaluatedSplit":
        """The host's (inputs, labels) on the devices, whole."""
        count, resident = count_rows(arrays), programs.replicate(padded_split(arrays, programs.eval_batch_size))

        def batches() -> Generator[tuple[Batch, int], None, None]:
            yield resident, count

        return cls(arrays[1], count, batches, lambda: resident)

    def evaluate(self, evaluate: Evaluate, before_call: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """Sums of loss and metrics [K], and predictions [K, count], over the split.

        `before_call` is called before each call of `evaluate`, and may raise to give up.
        """
        parts = []
        with contextlib.closing(self.batches()) as batches:
            for batch, size in batches:
                before_call()
                sums = evaluate(batch, size)
                parts.append(sums | {"predictions": sums["predictions"][:, :size]})
        sums = {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0] if name != "predictions"}
        return sums | {"predictions": np.concatenate([part["predictions"] for part in parts], axis=1)}

    def warm_up(self, evaluate: Evaluate) -> None:
        """Compile the evaluation, by evaluating nothing."""
        evaluate(self.empty(), 0)


def zeros(example: Any, size: int) -> Batch:
    """A batch of `size` examples of these shapes and dtypes."""
    batch: Batch = jax.tree.map(lambda leaf: np.zeros((size, *leaf.shape), leaf.dtype), example)
    return batch


@dataclasses.dataclass(frozen=True)
class Source:
    """What `fit` trains on: arrays, or an iterable of batches.

    Attributes:
      stage: which examples an epoch visits, and in how many steps.
      batch_size: examples per step.
      example: shapes and dtypes of (x, y) of one example.
      arrays: (x, y) of all examples, or None.
      batches: gives an epoch's batches, or None.
      validation: (x, y) to evaluate, or None.
    """

    stage: TrainingStage
    batch_size: int
    example: Any
    arrays: Any = None
    batches: Callable[[], Iterable[Any]] | None = None
    validation: Any = None

    def from_host(self, programs: Programs) -> BatchedExamples:
        """The arrays or the iterable, batch by batch; those of an iterable are the same for all seeds."""

        def epoch(seed_states: SeedStates, stage: TrainingStage, first: int) -> Generator[list[Batch], None, None]:
            if self.batches is not None:
                for batch in itertools.islice(self.batches(), first, None):
                    yield [programs.shard_batch(to_batch(batch))] * len(seed_states.seeds)
                return
            size = self.batch_size
            visited = seed_states.orders()[:, first * size : stage.whole_steps * size + stage.tail_size]
            for start in range(0, visited.shape[1], size):
                numbers = visited[:, start : start + size]
                rows = [jax.tree.map(lambda leaf, each=each: leaf[each], self.arrays) for each in numbers]
                yield [programs.shard_batch(each) for each in rows]

        count = 0 if self.arrays is None else count_rows(self.arrays)
        return BatchedExamples(programs, count, self.example, epoch)


def as_source(data: Any, validation: Any, batch_size: int, seed: int, drop_remainder: bool = False) -> Source:
    """What `fit` trains on, from its arguments; raises as `fit`."""
    check_at_least(1, batch_size=batch_size)
    if isinstance(data, tuple):
        arrays, batches = to_batch(data), None
        subset, count = np.arange(count_rows(arrays)), count_rows(arrays)
        if isinstance(validation, float):
            held = max(1, round(validation * count))
            if not 0 < validation < 1 or held >= count:
                raise UsageError(f"validation is {validation}, expected a fraction that leaves some of {count}")
            subset, held_out = hold_out(count, held, seed)
            validation = jax.tree.map(lambda leaf: leaf[held_out], arrays)
        if batch_size > len(subset):
            raise UsageError(f"batch_size is {batch_size}, but only {len(subset)} examples are trained on")
        first, stage = arrays, make_stage("train", subset, None, batch_size, drop_remainder)
    else:
        if not callable(data) and (isinstance(data, Iterator) or not isinstance(data, Iterable)):
            raise UsageError(
                f"data is of type {type(data).__name__}, expected (x, y), an iterable of batches that can be gone "
                "through once an epoch, or a function that makes an iterator"
            )
        arrays, batches = None, data if callable(data) else lambda: data
        epoch = batches()
        first = next(iter(epoch), None)
        if first is None:
            raise UsageError("data is an iterable without a batch")
        first = to_batch(first)
        batch_size, steps = count_rows(first), len(epoch) if isinstance(epoch, Sized) else None
        stage = TrainingStage("train", np.arange(0), None, steps, 2**30 if steps is None else steps, 0)
    if isinstance(validation, tuple):
        stage, validation = dataclasses.replace(stage, evaluates="validation"), to_batch(validation)
    elif validation is not None:
        raise UsageError(f"validation is of type {type(validation).__name__}, expected (x, y), or a fraction of arrays")
    return Source(stage, batch_size, one_example(first), arrays, batches, validation)


def one_example(batch: Any) -> Any:
    """Shapes and dtypes of an example of `batch`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)


def check_at_least(least: int, **given: Any) -> None:
    """Raise UsageError unless the values are integers of at least `least`."""
    for name, value in given.items():
        if not isinstance(value, Integral) or value < least:
            raise UsageError(f"{name} is {value!r:.100}, expected an integer of at least {least}")
