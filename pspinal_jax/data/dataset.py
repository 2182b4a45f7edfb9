"""A data set: its splits, its classes, and what a model sees of an example."""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from pspinal_jax.data.copies import Contents, digest_rows, draw_together
from pspinal_jax.errors import DataError, UsageError


class Split(Protocol):
    """Examples with their labels: arrays in memory (`ArraySplit`) or encoded images (`ImageSplit`)."""

    @property
    def inputs(self) -> np.ndarray | None:
        """All examples [N, ...]; None where they are read one by one."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [N], each 0 .. num_classes - 1."""

    @property
    def digests(self) -> np.ndarray:
        """uint64 [N], see `pspinal_jax.data.copies`."""

    def name(self, index: int) -> str:
        """What to call example number `index` in a message."""

    def __len__(self) -> int: ...

    def read(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Example number `index`; an encoded image is decoded and resized to `size`, (H, W)."""

    def take(self, indices: np.ndarray) -> Self:
        """The examples at `indices`, in that order; nothing is read."""

    def placed(self, *seeds: int) -> Self:
        """These examples, each seen from a place of its own that `seeds` decide, where there is a choice."""

    def join(self, other: Self) -> Self:
        """These examples, then those of `other`."""

    def checksum(self, validation: Self | None, test: Self, class_names: tuple[str, ...]) -> int:
        """A checksum of the data set of which this is the training split."""


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """A `Split` in memory.

    Attributes:
      inputs: images uint8 [N, H, W, C], or features float32 [N, D].
      labels: see `Split`.
    """

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """See `Split`."""
        return digest_rows(self.inputs)

    def name(self, index: int) -> str:
        """See `Split`."""
        return f"row {index}"

    def read(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """See `Split`; arrays have the size that they have."""
        del size
        example: np.ndarray = self.inputs[index]
        return example

    def take(self, indices: np.ndarray) -> "ArraySplit":
        """See `Split`."""
        return ArraySplit(self.inputs[indices], self.labels[indices])

    def placed(self, *seeds: int) -> "ArraySplit":
        """See `Split`; arrays leave no choice."""
        return self

    def join(self, other: "ArraySplit") -> "ArraySplit":
        """See `Split`."""
        return ArraySplit(np.concatenate([self.inputs, other.inputs]), np.concatenate([self.labels, other.labels]))

    def checksum(self, validation: "ArraySplit | None", test: "ArraySplit", class_names: tuple[str, ...]) -> int:
        """See `Split`: over every example and label."""
        del class_names
        crc = 0
        for split in (self, test, *([validation] if validation else [])):
            for array in (split.inputs, split.labels):
                crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
        return crc


S = TypeVar("S", bound=Split, covariant=True)
_UINT8 = np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Dataset(Generic[S]):
    """Splits of one kind, their classes, and where they came from.

    Attributes:
      splits: 'train', 'test', and 'validation' if there is one of its own.
      class_names: in the order of the labels 0 .. C-1.
      source: named in messages.
      example_shape: of one example as a model sees it, (H, W, C) or (D,).
      example_dtype: uint8 for images, float32 for features.
      skipped: names of the unreadable files that were left out.
      passed_over: what else was left out of a folder or a file, a line each.
      uncut: all examples, where the test split was cut from them and is none of the data's own.
      columns: names of the D features, where a frame or a table gave them.
    """

    splits: Mapping[str, S]
    class_names: tuple[str, ...]
    source: str
    example_shape: tuple[int, ...]
    example_dtype: np.dtype[Any] = _UINT8
    skipped: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    uncut: S | None = None
    columns: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)

    @property
    def in_memory(self) -> bool:
        """Whether the examples are arrays; otherwise they are read from files batch by batch."""
        return self.train.inputs is not None

    @property
    def train(self) -> S:
        """What is trained on."""
        return self.splits["train"]

    @property
    def test(self) -> S:
        """The test split."""
        return self.splits["test"]

    @property
    def validation(self) -> S | None:
        """The validation split, or None."""
        return self.splits.get("validation")

    def fingerprint(self) -> str:
        """A checksum that changes when an example, a label or a split does, and with images when a class name does."""
        return f"{self.train.checksum(self.validation, self.test, self.class_names):08x}"

    def contents(self) -> Contents:
        """What the examples of all splits are."""
        splits = {name: self.splits[name] for name in ("train", "validation", "test") if name in self.splits}
        ends = np.cumsum([len(split) for split in splits.values()])

        def name(index: int) -> str:
            number = int(np.searchsorted(ends, index, "right"))
            kind, split = list(splits.items())[number]
            return f"{kind} {split.name(index - int(ends[number]) + len(split)).removeprefix(self.source + os.sep)}"

        return Contents(
            np.concatenate([split.digests for split in splits.values()]),
            np.concatenate([split.labels for split in splits.values()]),
            name,
        )

    def with_validation(self, fraction: float, seed: int, keep_copies_together: bool = True) -> "Dataset[S]":
        """The data set with a validation split drawn from every class of the training split.

        Args:
          fraction: share of each class to hold out, rounded to the nearest number; a class keeps at least one training
            example. 0 holds nothing out.
          seed: decides the draw.
          keep_copies_together: whether copies go to one side.

        Returns:
          The data set; unchanged if it has its own validation split, or if there is nothing to hold out.

        Raises:
          UsageError: if `fraction` does not lie in 0 <= fraction < 1.
        """
        if not 0 <= fraction < 1:
            raise UsageError(f"the validation fraction is {fraction}, expected 0 <= fraction < 1")
        if self.validation is not None:
            return self
        copies = self.train.digests if keep_copies_together else None
        rest, held_out = split_by_class(self.train.labels, fraction, seed, copies)
        if not len(held_out):
            return self
        drawn = {"train": self.train.take(rest), "validation": self.train.take(held_out)}
        return dataclasses.replace(self, splits={**self.splits, **drawn})


def array_dataset(splits: dict[str, ArraySplit], class_names: tuple[str, ...], source: str) -> Dataset[ArraySplit]:
    """The data set of `splits`, 'train', 'test' and perhaps 'validation', which are as they should be."""
    inputs = splits["train"].inputs
    return Dataset(splits, class_names, source, inputs.shape[1:], inputs.dtype)


def check_labels(where: str, labels: np.ndarray, num_classes: int) -> None:
    """Raise DataError unless all labels of the split `where` are classes."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{where}_labels go from {low} to {high}, expected 0 .. {num_classes - 1}; correct the labels or set "
            "--data.num-classes"
        )


def hold_out(
    num_examples: int, num_validation: int, seed: int, copies: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation), both sorted: `num_validation` drawn without replacement by `seed`, and the rest.

    Args:
      num_examples: N.
      num_validation: how many to draw.
      seed: decides the draw.
      copies: integers [N]; examples of equal numbers are drawn together, see `draw_together`.

    Raises:
      UsageError: if nothing would be left to train on.
    """
    if num_validation >= num_examples:
        raise UsageError(
            f"data.num_validation is {num_validation}, but train has {num_examples} examples; choose fewer with "
            "--data.num-validation"
        )
    shuffled = np.random.default_rng(seed).permutation(num_examples)
    return _parted(num_examples, draw_together(shuffled, num_validation, copies))


def split_by_class(
    labels: np.ndarray, fraction: float, seed: int, copies: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`draw_by_class` with `fraction` of every class, rounded to the nearest number, but never all of one."""
    return draw_by_class(labels, lambda members: min(round(fraction * members), members - 1), seed, copies)


def draw_by_class(
    labels: np.ndarray, count: Callable[[int], int], seed: int, copies: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (rest, drawn), both sorted: `count(members)` of every class, drawn without replacement.

    Args:
      labels: integers [N].
      count: how many to draw of a class with so many members.
      seed: decides the draw; what one class draws does not depend on the others.
      copies: integers [N]; examples of a class that have equal numbers are drawn together, see `draw_together`.
    """
    drawn = [np.zeros(0, np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, int(label)]).permutation(members)
        drawn.append(draw_together(order, count(len(members)), copies))
    return _parted(len(labels), np.concatenate(drawn))


def _parted(count: int, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what of 0 .. `count` - 1 is not in `drawn`, `drawn`), both sorted."""
    return np.setdiff1d(np.arange(count), drawn), np.sort(drawn)
