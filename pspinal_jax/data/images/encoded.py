"""Images as they are stored: encoded bytes with labels, decoded only when they are read."""

import dataclasses
import functools
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from pspinal_jax.data.copies import digest_bytes, digest_files
from pspinal_jax.errors import DataError
from pspinal_jax.files import read_bytes


class Encoded(Protocol):
    """Encoded images by number. Must be picklable: worker processes get a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes:
        """The encoded image number `index`."""

    def name(self, index: int, /) -> str:
        """What to call image number `index` in a message."""


@runtime_checkable
class Stamped(Protocol):
    """What an `Encoded` has beside that if it need not be read to notice that an image changed."""

    def fingerprint(self) -> int:
        """A checksum that changes when an image does."""


@runtime_checkable
class Digested(Protocol):
    """What an `Encoded` has beside that if it need not be read to find copies."""

    def digests(self) -> np.ndarray:
        """uint64 [N], see `pspinal_jax.data.copies`."""


def digests_of(encoded: Encoded) -> np.ndarray:
    """The digests uint64 [N] of `encoded`: its own if it is `Digested`, else of what is read."""
    if isinstance(encoded, Digested):
        return encoded.digests()
    return np.array([digest_bytes(encoded[index]) for index in range(len(encoded))], np.uint64)


def fingerprint_of(encoded: Encoded) -> int:
    """The checksum of `encoded`: its own if it is `Stamped`, else over every name and byte."""
    if isinstance(encoded, Stamped):
        return encoded.fingerprint()
    crc = 0
    for index in range(len(encoded)):
        crc = zlib.crc32(encoded[index], zlib.crc32(encoded.name(index).encode(errors="surrogateescape"), crc))
    return crc


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """A `Split` of encoded images.

    Attributes:
      encoded: the images, N of them, of any sizes.
      labels: see `Split`.
      fit: how `read` makes them fit a size, see `pspinal_jax.data.images.decode.decode`.
      places: float32 [N], see there too; None for the middle.
    """

    encoded: Encoded
    labels: np.ndarray
    fit: Literal["squash", "crop", "pad"] = "squash"
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> None:
        """None: images are read one by one."""

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """See `Split`."""
        return digests_of(self.encoded)

    def name(self, index: int) -> str:
        """See `Split`."""
        return self.encoded.name(index)

    def read(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Image number `index` as uint8 [H, W, 3], resized to `size`.

        Raises:
          DataError: if it cannot be read or decoded; the message names it.
        """
        from pspinal_jax.data.images.decode import decode  # loads Pillow, and `prepare --help` has no need of it

        try:
            place = 0.5 if self.places is None else float(self.places[index])
            return decode(self.encoded[index], size, self.fit, place)
        except (DataError, OSError) as error:
            raise DataError(f"{self.encoded.name(index)}: {error}") from None

    def take(self, indices: np.ndarray) -> "ImageSplit":
        """See `Split`."""
        indices, labels = np.asarray(indices), self.labels[indices]
        places = None if self.places is None else self.places[indices]
        if isinstance(self.encoded, Selected):
            return ImageSplit(Selected(self.encoded.encoded, self.encoded.indices[indices]), labels, self.fit, places)
        return ImageSplit(Selected(self.encoded, indices), labels, self.fit, places)

    def placed(self, *seeds: int) -> "ImageSplit":
        """See `Split`: where `fit` is crop, each image's part lies elsewhere, as `seeds` decide."""
        if self.fit != "crop":
            return self
        return dataclasses.replace(self, places=np.random.default_rng(seeds).random(len(self), np.float32))

    def join(self, other: "ImageSplit") -> "ImageSplit":
        """See `Split`."""
        labels = np.concatenate([self.labels, other.labels])
        return ImageSplit(_Joined(self.encoded, other.encoded), labels, self.fit)

    def checksum(self, validation: "ImageSplit | None", test: "ImageSplit", class_names: tuple[str, ...]) -> int:
        """See `Split`: over images, how they are made to fit, labels and class names; see `fingerprint_of`."""
        crc = zlib.crc32("\0".join(class_names).encode(errors="surrogateescape"))
        for split in (self, validation, test):
            crc = zlib.crc32(f"{split._checksum():08x}".encode() if split is not None else b"none", crc)
        return crc if self.fit == "squash" else zlib.crc32(self.fit.encode(), crc)

    def _checksum(self) -> int:
        return zlib.crc32(np.ascontiguousarray(self.labels, np.int32).data, fingerprint_of(self.encoded))


@dataclasses.dataclass(frozen=True)
class Selected:
    """Some images of `encoded`, by their numbers there."""

    encoded: Encoded
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes:
        return self.encoded[int(self.indices[index])]

    def name(self, index: int) -> str:
        """Its name there."""
        return self.encoded.name(int(self.indices[index]))

    def fingerprint(self) -> int:
        """A checksum of all images there, and of which are taken."""
        return zlib.crc32(np.ascontiguousarray(self.indices, np.int64).data, fingerprint_of(self.encoded))

    def digests(self) -> np.ndarray:
        """Those of the images that are taken."""
        return digests_of(self.encoded)[self.indices]


@dataclasses.dataclass(frozen=True)
class _Joined:
    """The images of `first`, then those of `second`."""

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

    def digests(self) -> np.ndarray:
        """Those of both."""
        return np.concatenate([digests_of(self.first), digests_of(self.second)])


IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".jp2", ".avif", ".heic", ".heif"),
)
"""What an image's name ends in, in lower case; other files are left out, and a warning says so."""


def is_image(file: str) -> bool:
    """Whether the file's name, without folders, is that of an image."""
    return not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def list_images(path: Path, linked: bool = False) -> list[str]:
    """The files below `path` that are named like images: sorted paths relative to it, with '/' in them.

    Args:
      path: the folder.
      linked: whether linked folders are entered; each folder is so once, under the first name in the order of names.
    """
    found, seen = [], set()
    for folder, folders, files in os.walk(path, followlinks=linked):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(inner for inner in folders if not inner.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        prefix = Path(folder).relative_to(path).as_posix() + "/" if Path(folder) != path else ""
        found += [prefix + file for file in files if is_image(file)]
    return sorted(found)


MOST_BYTES = 2**28
"""That an encoded image in a file may have."""


class Files:
    """The encoded images in `files`, paths relative to `root`. What is no file is an OSError, and not opened.

    Whoever asks for checksums has given those of the contents, `crcs`, and sizes in bytes.
    """

    def __init__(self, root: Path, files: Sequence[str], crcs: Sequence[int] = (), sizes: Sequence[int] = ()) -> None:
        self.root, self.files = str(root), tuple(files)
        self.crcs, self.sizes = np.asarray(crcs, np.int64), np.asarray(sizes, np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> bytes:
        return read_bytes(Path(self.name(index)), MOST_BYTES)

    def name(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self.root, self.files[index])

    def fingerprint(self) -> int:
        """A checksum of names and contents, those that were given as `crcs`."""
        return zlib.crc32(self.crcs.data, zlib.crc32("\0".join(self.files).encode(errors="surrogateescape")))

    def digests(self) -> np.ndarray:
        """Those of the contents, uint64 [N]."""
        return digest_files(self.sizes, self.crcs)


Images: TypeAlias = np.ndarray | Encoded
"""uint8 [N, H, W, C], or N encoded images."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Checked examples that a data set is prepared from.

    Attributes:
      splits: split -> (images, labels [N], each 0 .. C-1).
      class_names: in the order of the labels.
      skipped: names of the images that were left out because they cannot be decoded.
    """

    splits: Mapping[str, tuple[Images, np.ndarray]]
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
