"""Copies, which are examples of the same content: counted across splits, and kept on one side where we cut.

An example's digest is 64 bits of its content without its label: of an array's row its numbers, of a file its bytes.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

_NAMED = 3


def digest_rows(rows: np.ndarray) -> np.ndarray:
    """Digests uint64 [N] of `rows` [N, ...]; equal numbers have equal digests, floats as float32 sees them."""
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
    """Integers [N], equal for rows of equal digest whose label is the same wherever that digest occurs.

    Rows that have several labels, as in tables of few distinct values, are no copies that a cut could keep together:
    with one class on either side of it, a model would be asked for the opposite of what it was taught.
    """
    _, groups = np.unique(digests, return_inverse=True)
    low = np.full(groups.max(initial=-1) + 1, np.iinfo(np.int64).max)
    high = np.full_like(low, np.iinfo(np.int64).min)
    np.minimum.at(low, groups, labels)
    np.maximum.at(high, groups, labels)
    alone = -1 - np.arange(len(groups))
    return np.where((low == high)[groups], groups, alone)


def draw_together(order: np.ndarray, count: int, groups: np.ndarray | None, exact: bool = False) -> np.ndarray:
    """The first `count` of the indices `order`, but with what is equal in `groups` drawn whole or not at all.

    Where `order` holds no copies, or `groups` is None, they are the first `count`. With copies they are as many as
    come nearest to it, which the sizes of the groups decide and `order` does not. Where every group has more than twice
    `count` members, as in tables of few distinct values, copies are separated.

    Args:
      order: distinct indices.
      count: how many to draw.
      groups: by index.
      exact: whether to draw `count` whatever that takes: where no whole groups give it, some copies are separated.
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
    """What all examples of a data set are: train first, then validation where it has such a split, then test.

    Attributes:
      digests: uint64 [N].
      labels: integers [N].
      name: index -> what to call that example.
    """

    digests: np.ndarray
    labels: np.ndarray
    name: Callable[[int], str]

    def named(self, places: np.ndarray) -> str:
        """The first of the examples at `places`, and how many more there are."""
        names = ", ".join(self.name(int(index)) for index in places[:_NAMED])
        return names + (f" and {len(places) - _NAMED:,} more" if len(places) > _NAMED else "")

    def find_copies(self, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> tuple[dict[str, int], str]:
        """Count the examples that are there on both sides of a split, or in several classes.

        Args:
          train: indices of what is trained on.
          validation: of what is validated on.
          test: of what is tested on.

        Returns:
          Counts: test_in_train, test examples that are trained or validated on as well; validation_in_train; and
          in_several_classes, examples whose content has another label too. And what to warn of, "" for nothing.
        """
        test_too = test[np.isin(self.digests[test], self.digests[np.concatenate([train, validation])])]
        validation_too = validation[np.isin(self.digests[validation], self.digests[train])]
        several = np.flatnonzero(copies_of_a_class(self.digests, self.labels) < 0)
        found = {
            "test_in_train": (test_too, f"of {len(test):,} test examples are also in train, identical"),
            "validation_in_train": (validation_too, f"of {len(validation):,} validation examples are also in train"),
            "in_several_classes": (several, "examples have identical copies in another class"),
        }
        texts = [f"{len(places):,} {text}: {self.named(places)}" for places, text in found.values() if len(places)]
        return {name: len(places) for name, (places, _) in found.items()}, "; ".join(texts)
