"""A data set: its splits, its classes, and the shape of its examples."""

import dataclasses
import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from pspinal_jax.data import near
from pspinal_jax.errors import DataError, UsageError

_MAX_NAMES = 5


def first_names(names: Sequence[str]) -> str:
    """The first few of `names`, separated by commas, for a message."""
    return ", ".join(names[:_MAX_NAMES]) + (", .." if len(names) > _MAX_NAMES else "")


def digest_rows(rows: np.ndarray) -> np.ndarray:
    """Digests uint64 [N] of `rows` [N, ...]; equal numbers have equal digests, where floats are compared as float32."""
    if np.issubdtype(rows.dtype, np.floating):
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float32) + np.float32(0)  # -0 becomes 0
    content = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
    width = len(content) // max(1, len(rows))
    found = [
        hashlib.blake2b(content[first : first + width], digest_size=8).digest()
        for first in np.arange(len(rows)) * width
    ]
    return np.frombuffer(b"".join(found), "<u8").astype(np.uint64)


def digest_files(sizes: Any, crcs: Any) -> np.ndarray:
    """Digests uint64 [N] of files by their sizes and CRC-32 checksums."""
    return np.asarray(sizes, np.uint64) << np.uint64(32) | np.asarray(crcs, np.uint64)


def digest_bytes(data: bytes) -> int:
    """The digest of a file's content, as `digest_files` gives it."""
    return len(data) << 32 | zlib.crc32(data)


def copies_of_a_class(digests: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Integers [N], equal for rows with equal digests whose label is the same wherever the digest occurs.

    Rows with several labels, as in tables of few distinct values, do not count as copies to keep together. With one
    class on each side of a split, a model would be asked for the opposite of what it was taught.
    """
    _, groups = np.unique(digests, return_inverse=True)
    low = np.full(groups.max(initial=-1) + 1, np.iinfo(np.int64).max)
    high = np.full_like(low, np.iinfo(np.int64).min)
    np.minimum.at(low, groups, labels)
    np.maximum.at(high, groups, labels)
    alone = -1 - np.arange(len(groups))
    return np.where((low == high)[groups], groups, alone)


def draw_together(order: np.ndarray, count: int, groups: np.ndarray | None, exact: bool = False) -> np.ndarray:
    """The first `count` of the indices `order`, except that members of a group are drawn together or not at all.

    If `order` holds no copies, or `groups` is None, these are the first `count`. With copies, the number is as close to
    `count` as the sizes of the groups allow, and does not depend on `order`. If every group has more than twice `count`
    members, as in tables of few distinct values, copies are separated.

    Args:
      order: distinct indices.
      count: number of indices to draw.
      groups: groups by index.
      exact: draw exactly `count`, and separate copies if whole groups do not add up to it.
    """
    if groups is None or len(np.unique(groups[order])) == len(order):
        return order[:count]
    together: dict[int, list[int]] = {}
    for index in order.tolist():
        together.setdefault(int(groups[index]), []).append(index)
    members = list(together.values())
    most = count if exact else min(2 * count, len(order) - 1)
    sums = _sums_of_the_last([len(each) for each in members], most)
    reached = [total for total in range(1, most + 1) if sums[0] >> total & 1]
    left = min(reached, key=lambda total: abs(total - count), default=0)
    drawn: list[int] = []
    for each, later in zip(members, sums[1:], strict=True):
        if len(each) <= left and later >> (left - len(each)) & 1:
            drawn += each
            left -= len(each)
    if exact or not drawn:
        drawn += order[~np.isin(order, drawn)][: count - len(drawn)].tolist()
    return np.asarray(drawn, order.dtype)


def _sums_of_the_last(sizes: list[int], most: int) -> list[int]:
    """For every k, the sums up to `most` that some of `sizes`[k:] have, as the bits of an integer."""
    sums = [1]
    for size in reversed(sizes):
        more = (sums[-1] | sums[-1] << size) & ((1 << most + 1) - 1)
        sums.append(sums[-1] if more == sums[-1] else more)  # one object: there are as many as examples
    return sums[::-1]


@dataclasses.dataclass(frozen=True)
class Contents:
    """Digests, labels and names of all examples: train first, then validation if there is one, then test.

    Attributes:
      digests: uint64 [N].
      labels: integers [N].
      name: index -> the name of that example.
      groups: see `Split`; None where a split has none.
      looks: likewise.
    """

    digests: np.ndarray
    labels: np.ndarray
    name: Callable[[int], str]
    groups: np.ndarray | None = None
    looks: np.ndarray | None = None

    def near_pairs(self) -> np.ndarray:
        """Pairs of examples that look alike without being identical, integers [P, 2], the nearest first."""
        if self.looks is None:
            return np.zeros((0, 2), np.int64)
        pairs, _ = near.find_pairs(self.looks)
        return pairs[self.digests[pairs[:, 0]] != self.digests[pairs[:, 1]]]

    def named(self, places: np.ndarray) -> str:
        """The names of the first examples at `places`."""
        return first_names([self.name(int(index)) for index in places[: _MAX_NAMES + 1]])

    def find_copies(self, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> tuple[dict[str, int], str]:
        """Count the examples that are on both sides of a split, or in several classes.

        Args:
          train: indices of the training examples.
          validation: indices of the validation examples.
          test: indices of the test examples.

        Returns:
          A dict of counts, and the text of a warning, "" for none. test_in_train counts test examples that are also in
          train or validation; validation_in_train likewise; in_several_classes counts examples whose content also has
          another label. For images, test_near_train counts test examples that look like a training or validation
          example without being identical, and near_pairs such pairs among all examples. With groups,
          test_groups_in_train counts test examples whose group is also in train or validation.
        """
        test_too = test[np.isin(self.digests[test], self.digests[np.concatenate([train, validation])])]
        validation_too = validation[np.isin(self.digests[validation], self.digests[train])]
        several = np.flatnonzero(copies_of_a_class(self.digests, self.labels) < 0)
        found = {
            "test_in_train": (test_too, f"of {len(test):,} test examples are also in train, identical"),
            "validation_in_train": (validation_too, f"of {len(validation):,} validation examples are also in train"),
            "in_several_classes": (several, "examples have identical copies in another class"),
        }
        known = np.concatenate([train, validation])
        if self.groups is not None:
            same = test[np.isin(self.groups[test], self.groups[known])]
            found["test_groups_in_train"] = same, f"of {len(test):,} test examples are of groups that are also in train"
        pairs, counts = self.near_pairs(), {}
        if self.looks is not None:
            both = np.isin(pairs, test) @ [1, 2], np.isin(pairs, known) @ [1, 2]
            across = pairs[np.isin(both[0], (1, 2)) & (both[0] + both[1] == 3)]
            alike = test[np.isin(test, across)]
            found["test_near_train"] = alike, f"of {len(test):,} test examples look like ones in train"
            counts["near_pairs"] = len(pairs)
        texts = [f"{len(places):,} {text}: {self.named(places)}" for places, text in found.values() if len(places)]
        return {name: len(places) for name, (places, _) in found.items()} | counts, "; ".join(texts)


class Split(Protocol):
    """Examples with their labels: arrays in memory (`ArraySplit`) or encoded images (`ImageSplit`)."""

    @property
    def inputs(self) -> np.ndarray | None:
        """All examples [N, ...]; None if they are read one by one."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [N], each 0 .. num_classes - 1."""

    @property
    def digests(self) -> np.ndarray:
        """uint64 [N], see `pspinal_jax.data.dataset`."""

    @property
    def groups(self) -> np.ndarray | None:
        """Integers [N], equal for examples that stay in the same split; None if only copies do."""

    @property
    def looks(self) -> np.ndarray | None:
        """uint8 [N, 256], see `pspinal_jax.data.near`; None if unknown."""

    def name(self, index: int) -> str:
        """The name of example number `index` in a message."""

    def __len__(self) -> int: ...

    def read(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Example number `index`; an encoded image is decoded and resized to `size`, (H, W)."""

    def take(self, indices: np.ndarray) -> Self:
        """The examples at `indices`, in that order; nothing is read."""

    def random_crop(self, *seeds: int) -> Self:
        """These examples with crops drawn by `seeds`, if images are cropped when they are read."""

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
      groups: likewise.
    """

    inputs: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None
    looks = None

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
        groups = None if self.groups is None else self.groups[indices]
        return ArraySplit(self.inputs[indices], self.labels[indices], groups)

    def random_crop(self, *seeds: int) -> "ArraySplit":
        """See `Split`; arrays are not cropped."""
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
    """Splits of one kind, with their classes and source.

    Attributes:
      splits: 'train', 'test' and, if the data has one, 'validation'.
      class_names: names of the classes, in the order of the labels 0 .. C-1.
      source: name of the source in messages.
      example_shape: shape of one example as the model sees it, (H, W, C) or (D,).
      example_dtype: uint8 for images, float32 for features.
      skipped: names of the unreadable files that were left out.
      passed_over: one line for everything else that was left out of a folder or a file.
      uncut: all examples, if the test split was split off from them.
      columns: names of the D features, if a frame or a table gave them.
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
        """The training split."""
        return self.splits["train"]

    @property
    def test(self) -> S:
        """The test split."""
        return self.splits["test"]

    @property
    def validation(self) -> S | None:
        """The validation split, or None."""
        return self.splits.get("validation")

    def map_splits(self, change: Callable[[S], S]) -> "Dataset[S]":
        """The data set with every split changed."""
        splits = {name: change(split) for name, split in self.splits.items()}
        uncut = None if self.uncut is None else change(self.uncut)
        return dataclasses.replace(self, splits=splits, uncut=uncut)

    def fingerprint(self) -> str:
        """A checksum that changes when an example, a label or a split does, and with images when a class name does."""
        return f"{self.train.checksum(self.validation, self.test, self.class_names):08x}"

    def place(self, index: int) -> tuple[str, int]:
        """The split, and the number in it, of example number `index` of all: train, then validation, then test."""
        for kind in ("train", "validation", "test"):
            if kind in self.splits and index < len(self.splits[kind]):
                return kind, index
            index -= len(self.splits[kind]) if kind in self.splits else 0
        raise IndexError(index)

    def contents(self) -> Contents:
        """What the examples of all splits are."""
        splits = {name: self.splits[name] for name in ("train", "validation", "test") if name in self.splits}

        def name(index: int) -> str:
            kind, number = self.place(index)
            return f"{kind} {self.splits[kind].name(number).removeprefix(self.source + os.sep)}"

        def joined(field: str) -> Any:
            parts = [getattr(split, field) for split in splits.values()]
            return None if any(part is None for part in parts) else np.concatenate(parts)

        return Contents(joined("digests"), joined("labels"), name, joined("groups"), joined("looks"))

    def with_validation(self, fraction: float, seed: int, keep_copies_together: bool = True) -> "Dataset[S]":
        """The data set with a validation split drawn from every class of the training split.

        Args:
          fraction: fraction of each class to hold out, rounded to the nearest number; a class keeps at least one
            training example. 0 holds nothing out.
          seed: seed of the draw.
          keep_copies_together: whether copies stay in the same split.

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
        rest, held_out = split_by_class(self.train.labels, fraction, seed, copies, self.train.groups)
        if not len(held_out):
            return self
        drawn = {"train": self.train.take(rest), "validation": self.train.take(held_out)}
        return dataclasses.replace(self, splits={**self.splits, **drawn})


def array_dataset(splits: dict[str, ArraySplit], class_names: tuple[str, ...], source: str) -> Dataset[ArraySplit]:
    """The data set of `splits`, 'train', 'test' and perhaps 'validation', which are as they should be."""
    inputs = splits["train"].inputs
    return Dataset(splits, class_names, source, inputs.shape[1:], inputs.dtype)


def cut_test(
    data: Dataset[S], fraction: float, seed: int, keep_copies_together: bool = True, needs_test: bool = True
) -> Dataset[S]:
    """`data`, which has no test split, with `fraction` of each class cut from its training split by `seed`.

    Copies go to one side unless `keep_copies_together` is false; of arrays, those that lie in one class only.

    Raises:
      UsageError: if `fraction` does not lie in 0 < fraction < 1, or, where the test split is needed, no class has
        enough examples.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"test_fraction is {fraction}, expected 0 < test_fraction < 1")
    whole = data.train
    copies = copies_of_a_class(whole.digests, whole.labels) if data.in_memory else whole.digests
    rest, drawn = split_by_class(whole.labels, fraction, seed, copies if keep_copies_together else None, whole.groups)
    if needs_test and not len(drawn):
        raise UsageError(
            f"{data.source}: no class has enough examples to hold out {fraction:g} of it; provide a test split"
        )
    splits = {"train": whole.take(rest), "test": whole.take(drawn)}
    return dataclasses.replace(data, splits=splits, uncut=whole)


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
    labels: np.ndarray, fraction: float, seed: int, copies: np.ndarray | None = None, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`draw_by_class` with `fraction` of every class, rounded to the nearest number, but never all of one.

    With `groups`, integers [N], examples of equal numbers are drawn together, whatever their classes; then `copies` are
    not looked at, and what is drawn of a class may be less or more.
    """

    def count(members: int) -> int:
        return min(round(fraction * members), members - 1)

    if groups is None:
        return draw_by_class(labels, count, seed, copies)
    return _parted(len(labels), _draw_groups(labels, groups, count, seed))


def _draw_groups(labels: np.ndarray, groups: np.ndarray, count: Callable[[int], int], seed: int) -> np.ndarray:
    """Indices of whole groups, drawn so that every class comes near to `count`(its members) and keeps one example.

    In random order those are drawn that no class has too many of, then those that bring the numbers nearer.
    """
    number, members = np.unique(groups, return_inverse=True)[1], np.bincount(labels)
    wanted, left = np.array([count(each) if each else 0 for each in members]), members - 1
    rows = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
    drawn, taken = np.zeros_like(wanted), np.zeros(len(rows), bool)
    order = np.random.default_rng(seed).permutation(len(rows))
    for exact in (True, False):
        for each in order[~taken[order]]:
            classes, sizes = np.unique(labels[rows[each]], return_counts=True)
            off = wanted[classes] - drawn[classes]
            fits = (sizes <= off).all() if exact else np.abs(off - sizes).sum() < np.abs(off).sum()
            if fits and (drawn[classes] + sizes <= left[classes]).all():
                drawn[classes] += sizes
                taken[each] = True
    return np.flatnonzero(taken[number])


def joined_groups(*keys: np.ndarray, pairs: np.ndarray | None = None) -> np.ndarray:
    """Integers [N], equal for connected examples: by equal values in one of `keys` [N], or by `pairs` [P, 2]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, nodes, first = [], [], len(keys[0])
    if pairs is not None:
        rows.append(pairs[:, 0])
        nodes.append(pairs[:, 1])
    for key in keys:
        values = np.unique(key, return_inverse=True)[1]
        rows.append(np.arange(len(key)))
        nodes.append(first + values)
        first += values.max(initial=-1) + 1
    edges = np.concatenate(rows), np.concatenate(nodes)
    graph = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(first, first))
    return np.asarray(connected_components(graph, directed=False)[1][: len(keys[0])])


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
