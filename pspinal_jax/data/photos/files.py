"""Pictures that lie in files."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
