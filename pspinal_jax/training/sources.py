"""Where the batches of `fit` come from: arrays of any library, on the devices or on the host, or an iterable."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from numbers import Integral
from typing import Any

import jax
import numpy as np

from pspinal_jax.data.dataset import hold_out
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.training.examples import ChunkSteps, EvaluatedSplit, Examples, InMemoryExamples, InMemorySplit
from pspinal_jax.training.loop import Setup
from pspinal_jax.training.programs import Chunk, Programs, SeedStates
from pspinal_jax.training.stages import LoopConfig, TrainingStage, make_stage
from pspinal_jax.training.step import count_rows


class Source:
    """Where the batches come from: arrays, or an iterable of batches."""

    def __init__(self, arrays: Any, batches: Callable[[], Iterable[Any]] | None, batch_size: int) -> None:
        self.arrays, self._batches, self.batch_size = arrays, batches, batch_size
        self.subset, self.validation = np.arange(0), None
        self._pads_last_batch = False
        first = jax.tree.map(lambda leaf: leaf[:1], arrays)
        self._length: int | None = None
        if batches is not None:
            epoch = batches()
            self._length = len(epoch) if isinstance(epoch, Sized) else None
            first = next(iter(epoch), None)
            if first is None:
                raise UsageError("data is an iterable without a batch")
            first = to_batch(first)
            self.batch_size = count_rows(first)
        self.example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), first)

    @classmethod
    def of(cls, data: Any, validation: Any, batch_size: int, seed: int) -> "Source":
        """The source that `data` and `validation` make; raises as `fit`."""
        check_at_least(1, batch_size=batch_size)
        if isinstance(data, tuple):
            arrays = to_batch(data)
            source = cls(arrays, None, batch_size)
            count = count_rows(arrays)
            source.subset = np.arange(count)
            if isinstance(validation, float):
                if not 0 < validation < 1:
                    raise UsageError(f"validation is {validation}, expected a fraction between 0 and 1, or (x, y)")
                held = max(1, round(validation * count))
                if held >= count:
                    raise UsageError(f"validation is {validation}, which leaves none of {count} examples to train on")
                source.subset, held_out = hold_out(count, held, seed)
                source.validation = jax.tree.map(lambda leaf: leaf[held_out], arrays)
            if batch_size > len(source.subset):
                raise UsageError(f"batch_size is {batch_size}, but only {len(source.subset)} examples are trained on")
        else:
            source = cls(None, _each_epoch(data), batch_size)
        if isinstance(validation, tuple):
            source.validation = to_batch(validation)
        elif validation is not None and source.validation is None:
            raise UsageError(
                f"validation is of type {type(validation).__name__}, expected (x, y)"
                + (" or a fraction" if source.arrays is not None else "")
            )
        return source

    @classmethod
    def padded(cls, inputs: np.ndarray, labels: np.ndarray, weights: np.ndarray, batch_size: int) -> "Source":
        """Examples with weights, and zeros of weight 0 up to a power of two of whole batches.

        The last batch of an epoch is filled with them, and trainings on about as many examples call the same program.
        """
        batches = 1 << (len(inputs) // batch_size).bit_length()
        extra = batches * batch_size - len(inputs) - 1
        # An order ends in zeros, so example 0 is a padding one.
        arrays = jax.tree.map(
            lambda leaf: np.pad(leaf, [(1, extra)] + [(0, 0)] * (leaf.ndim - 1)), (inputs, (labels, weights))
        )
        source = cls(arrays, None, batch_size)
        source.subset, source._pads_last_batch = 1 + np.arange(len(inputs)), True
        return source

    def check_labels(self, num_classes: int) -> None:
        """Raise UsageError if the labels do not fit so many logits."""
        for arrays in (self.arrays, self.validation):
            labels = arrays[1] if arrays is not None else np.zeros(0)
            if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
                raise UsageError(
                    f"labels reach from {labels.min()} to {labels.max()}, expected 0 .. {num_classes - 1}: the model "
                    f"gives {num_classes} logits"
                )

    def checksum(self) -> str | None:
        """Of the arrays; None for an iterable."""
        return None if self.arrays is None else checksum((self.arrays, self.subset, self.validation))

    def set_up(self, config: LoopConfig, programs: Programs, drop_remainder: bool, on_device: bool) -> Setup:
        """What the loop works with."""
        stage = make_stage(
            "train", self.subset, None if self.validation is None else "validation", self.batch_size, drop_remainder
        )
        if self._pads_last_batch:
            steps = -(-len(self.subset) // self.batch_size)
            stage = dataclasses.replace(stage, steps_per_epoch=steps, whole_steps=steps, tail_size=0)
        examples: Examples
        if self._batches is not None:
            stage = dataclasses.replace(stage, steps_per_epoch=self._length, whole_steps=self._length or 2**30)
            examples = BatchedExamples(programs, self._batches, self.batch_size)
        elif on_device:
            examples = InMemoryExamples(programs, self.arrays)
        else:
            examples = BatchedExamples(programs, self.arrays, self.batch_size)
        splits: dict[str, EvaluatedSplit] = {}
        if self.validation is not None:
            splits["validation"] = InMemorySplit.place(programs, self.validation, programs.eval_batch_size)
        nothing = np.zeros(0, np.int32)
        return Setup(config, programs, examples, splits, [stage], nothing, nothing)


def check_at_least(least: int, **given: Any) -> None:
    """Raise UsageError unless the values are integers of at least `least`."""
    for name, value in given.items():
        if not isinstance(value, Integral) or value < least:
            shown = value if isinstance(value, int | float | str) else f"of type {type(value).__name__}"
            raise UsageError(f"{name} is {shown}, expected an integer of at least {least}")


def to_batch(data: Any) -> Any:
    """(x, y) as NumPy arrays whose first axes agree."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise UsageError(f"data is of type {type(data).__name__}, expected (x, y) or batches of (x, y)")
    batch = to_numpy(data[0], "x"), to_numpy(data[1], "y")
    count_examples(batch, "(x, y)")
    return batch


def _each_epoch(data: Any) -> Callable[[], Iterable[Any]]:
    """Gives the batches of an epoch."""
    if callable(data):
        return data
    if not isinstance(data, Iterable):
        raise UsageError(
            f"data is of type {type(data).__name__}, expected (x, y), an iterable of batches or a function"
        )
    if isinstance(data, Iterator):
        raise UsageError(
            "data is an iterator, which can be gone through only once; pass a function that makes it, such as "
            "lambda: batches()"
        )
    return lambda: data


class BatchedExamples:
    """Batches that the host brings, step by step; `Examples` for arrays that stay there, and for iterables."""

    first_chunk = 1

    def __init__(self, programs: Programs, source: Any, batch_size: int) -> None:
        """`source` is arrays (x, y), or a function that gives an epoch's batches."""
        self._programs, self._source, self._batch_size = programs, source, batch_size
        self.count = 0 if callable(source) else count_rows(source)
        self.waited = 0.0

    def warm_up(self, seed_states: SeedStates, stage: TrainingStage) -> None:
        """See `Examples`; the first step compiles."""

    def chunks(
        self, seed_states: SeedStates, stage: TrainingStage, first: int, steps: ChunkSteps
    ) -> Generator[Chunk, None, None]:
        """See `Examples`. Batches of an iterable are the same for all seeds."""
        remaining = itertools.islice(self._epoch(seed_states, stage), first, None)
        while (batches := next(remaining, None)) is not None:
            count = steps(stage.whole_steps - first) or 1
            placed = map(self._place, itertools.chain([batches], itertools.islice(remaining, count - 1)))
            yield Chunk(first, count, batches=placed)
            first += count

    def _epoch(self, seed_states: SeedStates, stage: TrainingStage) -> Iterator[list[Any]]:
        """A step's batches, one for each seed."""
        if callable(self._source):
            for batch in self._source():
                yield [to_batch(batch)] * len(seed_states.seeds)
            return
        orders, size = seed_states.orders(), self._batch_size
        used = stage.whole_steps * size + stage.tail_size
        for start in range(0, used, size):
            rows = [order[start : min(start + size, used)] for order in orders]
            yield [jax.tree.map(lambda leaf, each=each: leaf[each], self._source) for each in rows]

    def _place(self, batches: list[Any]) -> list[Any]:
        if all(batch is batches[0] for batch in batches):
            return [self._programs.shard_batch(batches[0])] * len(batches)
        return [self._programs.shard_batch(batch) for batch in batches]


def to_numpy(tree: Any, name: str) -> Any:
    """`tree` with a NumPy array of a type that JAX computes with for each of its leaves.

    Args:
      tree: an array or a frame (NumPy, JAX, PyTorch, pandas, polars), a list of numbers, or a tuple or dict of such.
      name: what it is called in errors.

    Raises:
      DataError: if a leaf does not hold numbers.
    """
    return jax.tree.map(lambda leaf: _array(leaf, name), tree, is_leaf=_is_array)


def _is_array(value: Any) -> bool:
    return isinstance(value, list) or hasattr(value, "to_numpy") or hasattr(value, "detach")


def _array(leaf: Any, name: str) -> np.ndarray:
    if hasattr(leaf, "detach"):
        leaf = leaf.detach().cpu().numpy()
    elif hasattr(leaf, "to_numpy"):
        leaf = leaf.to_numpy()
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise DataError(f"{name} holds {int(leaf.mask.sum())} masked values; fill them in or leave their examples out")
    array = np.asarray(leaf)
    if array.dtype.kind not in "biufc" and array.dtype != jax.numpy.bfloat16:
        raise DataError(f"{name} is of type {array.dtype}, expected numbers; turn text into numbers first")
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def count_examples(tree: Any, name: str) -> int:
    """The length of the first axis of all arrays in `tree`.

    Raises:
      DataError: if there is none, or they differ.
    """
    leaves = jax.tree.leaves(tree)
    lengths = {len(leaf) if leaf.ndim else -1 for leaf in leaves}
    if len(lengths) != 1 or -1 in lengths:
        shapes = ", ".join(str(leaf.shape) for leaf in leaves) or "none"
        raise DataError(f"{name} has arrays of shapes {shapes}, expected one first axis, of examples, for all")
    return lengths.pop()


def checksum(tree: Any) -> str:
    """A checksum of all arrays in `tree`, with their shapes and dtypes."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
