"""A prepared data set's arrays kept beside it, because decoding 70,000 PNG records takes ten seconds every time."""

import contextlib
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pspinal_jax.data.idx import Arrays

_MOST_BYTES = 2**28  # of a prepared directory; larger sets are not meant to be held in memory
_CHUNK = 1 << 20
_STAMP = "stamp"


def read_through_cache(directory: Path, read: Callable[[], Arrays]) -> Arrays:
    """What `read` returns for the prepared `directory`, from its cache where that is whole and still fits.

    The cache is `.VERSION.arrays.npz` beside the directory. It is made after the first read; where it cannot be, or is
    damaged, or belongs to other records, the records are read.
    """
    stamp = _stamp(directory)
    if stamp is None:
        return read()
    path = directory.with_name(f".{directory.name}.arrays.npz")
    arrays = _load(path, stamp)
    if arrays is None:
        arrays = read()
        _store(path, stamp, arrays)
    return arrays


def _stamp(directory: Path) -> str | None:
    """A checksum of every file in `directory`, or None if it is too large or not readable."""
    digest = hashlib.sha256()
    try:
        files = sorted(path for path in directory.iterdir() if path.is_file())
        if sum(path.stat().st_size for path in files) > _MOST_BYTES:
            return None
        for path in files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0{_crc(path)}\0".encode())
    except OSError:
        return None
    return digest.hexdigest()


def _crc(path: Path) -> int:
    # Names and sizes alone would not notice that only labels changed.
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            crc = zlib.crc32(piece, crc)
    return crc


def _load(path: Path, stamp: str) -> Arrays | None:
    try:
        with path.open("rb") as file, np.load(file) as archive:  # never unpickles, and zip checks every array's CRC
            if str(archive[_STAMP]) != stamp:
                return None
            names = [name.removesuffix("_images") for name in archive.files if name.endswith("_images")]
            return {name: (archive[f"{name}_images"], archive[f"{name}_labels"]) for name in names}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        return None


def _store(path: Path, stamp: str, arrays: Arrays) -> None:
    named = {f"{name}_images": images for name, (images, _) in arrays.items()}
    named |= {f"{name}_labels": labels for name, (_, labels) in arrays.items()}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    # A folder that cannot be written or is full only costs the next reader time.
    with contextlib.suppress(OSError):
        try:
            with part.open("wb") as file:
                np.savez(file, **{_STAMP: np.array(stamp)}, **named)  # type: ignore[arg-type]
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
