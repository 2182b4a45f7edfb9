"""Encoded images with labels, decoded only when they are read."""

import dataclasses
import functools
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from pspinal_jax.data.dataset import digest_bytes, digest_files
from pspinal_jax.errors import DataError
from pspinal_jax.files import read_bytes

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".jp2", ".avif", ".heic", ".heif"),
)
"""Suffixes of image files, in lower case; files with other suffixes are left out with a warning."""

MAX_BYTES = 2**28
"""The largest encoded image that is read."""


class Encoded(ABC):
    """Encoded images by number. Must be picklable: worker processes get a copy."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int, /) -> bytes:
        """The encoded image number `index`."""

    @abstractmethod
    def name(self, index: int, /) -> str:
        """The name of image number `index` in messages."""

    def fingerprint(self) -> int:
        """A checksum that changes when an image does."""
        crc = 0
        for index in range(len(self)):
            crc = zlib.crc32(self[index], zlib.crc32(self.name(index).encode(errors="surrogateescape"), crc))
        return crc

    def digests(self) -> np.ndarray:
        """Digests uint64 [N] of the contents, see `pspinal_jax.data.dataset.digest_files`."""
        return np.array([digest_bytes(self[index]) for index in range(len(self))], np.uint64)


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """A `Split` of encoded images.

    Attributes:
      encoded: the images, N of them, of any sizes.
      labels: see `Split`.
      resize_mode: how `read` resizes an image of another aspect, see `pspinal_jax.data.images.decode.decode`.
      centering: float32 [N], where each crop lies, see there too; None for the middle.
      groups: see `Split`.
      looks: likewise.
    """

    encoded: Encoded
    labels: np.ndarray
    resize_mode: Literal["squash", "crop", "pad"] = "squash"
    centering: np.ndarray | None = None
    groups: np.ndarray | None = None
    looks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> None:
        """None: images are read one by one."""

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """See `Split`."""
        return self.encoded.digests()

    def name(self, index: int) -> str:
        """See `Split`."""
        return self.encoded.name(index)

    def read(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Image number `index` as uint8 [H, W, 3], resized to `size`.

        Raises:
          DataError: if it cannot be read or decoded; the message names it.
        """
        from pspinal_jax.data.images.decode import decode  # loads Pillow, which `prepare --help` can do without

        try:
            centering = 0.5 if self.centering is None else float(self.centering[index])
            return decode(self.encoded[index], size, self.resize_mode, centering)
        except (DataError, OSError) as error:
            raise DataError(f"{self.encoded.name(index)}: {error}") from None

    def take(self, indices: np.ndarray) -> "ImageSplit":
        """See `Split`."""
        selected = Selected(self.encoded, np.asarray(indices))
        if isinstance(self.encoded, Selected):
            selected = Selected(self.encoded.encoded, self.encoded.indices[indices])
        rest = (None if each is None else each[indices] for each in (self.centering, self.groups, self.looks))
        return ImageSplit(selected, self.labels[indices], self.resize_mode, *rest)

    def random_crop(self, *seeds: int) -> "ImageSplit":
        """See `Split`: with `resize_mode` crop, each image gets a centering drawn by `seeds`."""
        if self.resize_mode != "crop":
            return self
        return dataclasses.replace(self, centering=np.random.default_rng(seeds).random(len(self), np.float32))

    def join(self, other: "ImageSplit") -> "ImageSplit":
        """See `Split`."""
        labels = np.concatenate([self.labels, other.labels])
        groups = None
        if self.groups is not None and other.groups is not None:
            groups = np.concatenate([self.groups, other.groups])
        return ImageSplit(_Joined(self.encoded, other.encoded), labels, self.resize_mode, groups=groups)

    def checksum(self, validation: "ImageSplit | None", test: "ImageSplit", class_names: tuple[str, ...]) -> int:
        """See `Split`: over images, resize mode, labels and class names."""
        crc = zlib.crc32("\0".join(class_names).encode(errors="surrogateescape"))
        for split in (self, validation, test):
            crc = zlib.crc32(f"{split._checksum():08x}".encode() if split is not None else b"none", crc)
        return crc if self.resize_mode == "squash" else zlib.crc32(self.resize_mode.encode(), crc)

    def _checksum(self) -> int:
        return zlib.crc32(np.ascontiguousarray(self.labels, np.int32).data, self.encoded.fingerprint())


@dataclasses.dataclass(frozen=True)
class Selected(Encoded):
    """The images `indices` of `encoded`."""

    encoded: Encoded
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes:
        return self.encoded[int(self.indices[index])]

    def name(self, index: int) -> str:
        """See `Encoded`."""
        return self.encoded.name(int(self.indices[index]))

    def fingerprint(self) -> int:
        """A checksum of all images of `encoded` and of the selection."""
        return zlib.crc32(np.ascontiguousarray(self.indices, np.int64).data, self.encoded.fingerprint())

    def digests(self) -> np.ndarray:
        """See `Encoded`."""
        return self.encoded.digests()[self.indices]


class _Joined(Encoded):
    """The images of several, one after the other."""

    def __init__(self, *parts: Encoded) -> None:
        self._items = [(part, index) for part in parts for index in range(len(part))]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> bytes:
        part, at = self._items[index]
        return part[at]

    def name(self, index: int) -> str:
        part, at = self._items[index]
        return part.name(at)


class Files(Encoded):
    """The encoded images in `files`, paths relative to `root`; reading a pipe or a device raises OSError.

    Fingerprints and digests need the checksums of the contents, `crcs`, and the sizes in bytes.
    """

    def __init__(self, root: Path, files: Sequence[str], crcs: Sequence[int] = (), sizes: Sequence[int] = ()) -> None:
        self.root, self.files = str(root), tuple(files)
        self.crcs, self.sizes = np.asarray(crcs, np.int64), np.asarray(sizes, np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> bytes:
        return read_bytes(Path(self.name(index)), MAX_BYTES)

    def name(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self.root, self.files[index])

    def fingerprint(self) -> int:
        """A checksum of names and `crcs`."""
        return zlib.crc32(self.crcs.data, zlib.crc32("\0".join(self.files).encode(errors="surrogateescape")))

    def digests(self) -> np.ndarray:
        """See `Encoded`."""
        return digest_files(self.sizes, self.crcs)


def is_image(file: str) -> bool:
    """Whether the file's name, without folders, is that of an image."""
    return not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def list_images(path: Path, linked: bool = False) -> list[str]:
    """Sorted paths, relative to `path` and with '/' in them, of the files below it that are named like images.

    Args:
      path: the folder.
      linked: whether linked folders are entered; each folder is entered once, under the first of its names.
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
