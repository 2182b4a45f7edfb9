"""Photographs as they are stored: encoded bytes with labels, decoded only when they are read."""

import dataclasses
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from pspinal_jax.errors import UsageError


class Encoded(Protocol):
    """Encoded pictures by number. Must be picklable: worker processes get a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes:
        """The encoded picture number `index`."""

    def name(self, index: int, /) -> str:
        """What to call picture number `index` in a message."""


@runtime_checkable
class Stamped(Protocol):
    """What an `Encoded` has beside that if it need not be read to notice that a picture changed."""

    def fingerprint(self) -> int:
        """A checksum that changes when a picture does."""


def fingerprint_of(encoded: Encoded) -> int:
    """The checksum of `encoded`: its own if it is `Stamped`, else over every name and byte."""
    if isinstance(encoded, Stamped):
        return encoded.fingerprint()
    crc = 0
    for index in range(len(encoded)):
        crc = zlib.crc32(encoded[index], zlib.crc32(encoded.name(index).encode(), crc))
    return crc


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """A split of photographs.

    Attributes:
      encoded: the pictures, N of them, of any sizes.
      labels: int32 [N], each 0 .. num_classes - 1.
    """

    encoded: Encoded
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "ImageSplit":
        """The photographs at `indices`, in that order; nothing is read."""
        indices, labels = np.asarray(indices), self.labels[indices]
        if isinstance(self.encoded, _Taken):
            return ImageSplit(_Taken(self.encoded.encoded, self.encoded.indices[indices]), labels)
        return ImageSplit(_Taken(self.encoded, indices), labels)

    def join(self, other: "ImageSplit") -> "ImageSplit":
        """These photographs, then those of `other`."""
        return ImageSplit(_Joined(self.encoded, other.encoded), np.concatenate([self.labels, other.labels]))

    def fingerprint(self) -> int:
        """A checksum of pictures and labels; see `fingerprint_of`."""
        return zlib.crc32(np.ascontiguousarray(self.labels, np.int32).data, fingerprint_of(self.encoded))


@dataclasses.dataclass(frozen=True)
class _Taken:
    """Some of `encoded`, by their numbers there."""

    encoded: Encoded
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes:
        return self.encoded[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.encoded.name(int(self.indices[index]))

    def fingerprint(self) -> int:
        return zlib.crc32(np.ascontiguousarray(self.indices, np.int64).data, fingerprint_of(self.encoded))


@dataclasses.dataclass(frozen=True)
class _Joined:
    """The pictures of `first`, then those of `second`."""

    first: Encoded
    second: Encoded

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def _place(self, index: int) -> tuple[Encoded, int]:
        return (self.first, index) if index < len(self.first) else (self.second, index - len(self.first))

    def __getitem__(self, index: int) -> bytes:
        part, at = self._place(index)
        return part[at]

    def name(self, index: int) -> str:
        part, at = self._place(index)
        return part.name(at)


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """Splits of photographs, their classes' names, and where they came from.

    Attributes:
      train: what is trained on.
      validation: a validation split of its own, or None.
      test: the test split.
      class_names: in the order of the labels 0 .. C-1.
      source: named in messages.
      skipped: names of the unreadable files that were left out.
    """

    train: ImageSplit
    validation: ImageSplit | None
    test: ImageSplit
    class_names: tuple[str, ...]
    source: str
    skipped: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """A checksum that changes when a picture, a label, a class name or the split does; see `fingerprint_of`."""
        crc = zlib.crc32("\0".join(self.class_names).encode(errors="surrogateescape"))
        for split in (self.train, self.validation, self.test):
            crc = zlib.crc32(f"{split.fingerprint():08x}".encode() if split is not None else b"none", crc)
        return f"{crc:08x}"

    def with_validation(self, fraction: float, seed: int) -> "ImageDataset":
        """The data set with a validation split drawn from every class of the training split.

        Args:
          fraction: share of each class to hold out, rounded to the nearest number; a class keeps at least one training
            picture. 0 holds nothing out.
          seed: decides the draw.

        Returns:
          The data set; unchanged if it has its own validation split, or if there is nothing to hold out.

        Raises:
          UsageError: if `fraction` does not lie in 0 <= fraction < 1.
        """
        if not 0 <= fraction < 1:
            raise UsageError(f"the validation fraction is {fraction}, expected 0 <= fraction < 1")
        if self.validation is not None:
            return self
        kept, held_out = split_by_class(self.train.labels, fraction, seed)
        if not len(held_out):
            return self
        return dataclasses.replace(self, train=self.train.take(kept), validation=self.train.take(held_out))


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, drawn), both sorted: `fraction` of every class drawn by `seed`, but never all of one.

    Args:
      labels: integers [N].
      fraction: share of each class to draw, rounded to the nearest number.
      seed: decides the draw; what one class draws does not depend on the others.
    """
    drawn = [np.zeros(0, np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(round(fraction * len(members)), len(members) - 1)
        drawn.append(np.random.default_rng([seed, int(label)]).permutation(members)[:count])
    taken = np.sort(np.concatenate(drawn))
    return np.setdiff1d(np.arange(len(labels)), taken), taken


PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".jp2", ".avif", ".heic", ".heif"),
)
"""What a picture's name ends in, in lower case; other files are passed over in silence."""


def is_picture(file: str) -> bool:
    """Whether the file's name, without folders, is that of a picture."""
    return not file.startswith(".") and os.path.splitext(file)[1].lower() in PICTURE_SUFFIXES


def list_pictures(path: Path) -> list[str]:
    """The files below `path` that are named like pictures: sorted paths relative to it, with '/' in them."""
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        prefix = Path(folder).relative_to(path).as_posix() + "/" if Path(folder) != path else ""
        found += [prefix + file for file in files if is_picture(file)]
    return sorted(found)


class Files:
    """The encoded pictures in `files`, paths relative to `root`."""

    def __init__(self, root: Path, files: Sequence[str], crcs: Sequence[int] = ()) -> None:
        self.root, self.files, self.crcs = str(root), tuple(files), np.asarray(crcs, np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self.root, self.files[index])

    def fingerprint(self) -> int:
        """A checksum of names and contents, those that were given as `crcs`."""
        return zlib.crc32(self.crcs.data, zlib.crc32("\0".join(self.files).encode(errors="surrogateescape")))
