"""What takes long to read, kept in a stamped .npz beside it: 70,000 PNG records cost ten seconds every time."""

import contextlib
import hashlib
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pspinal_jax.files import atomic_file

Named = dict[str, np.ndarray]
_MOST_BYTES = 2**28  # of a prepared directory; larger sets are not meant to be held in memory
_CHUNK = 1 << 20
_STAMP = "stamp"


def read_through_cache(
    directory: Path, kind: str, stamp: str | None, read: Callable[[], Named], fits: Callable[[Named], bool]
) -> Named:
    """The arrays that `read` returns for the prepared `directory`, from its cache where that is whole and still fits.

    Args:
      directory: a prepared data set.
      kind: the cache is `.VERSION.KIND.npz` beside it.
      stamp: says which files the arrays belong to; None for no cache.
      read: makes the arrays. They are stored then; where they cannot be, the next reader makes them again.
      fits: whether arrays with the right stamp are those that `read` would make.
    """
    if stamp is None:
        return read()
    path = directory.with_name(f".{directory.name}.{kind}.npz")
    arrays = _load(path, stamp)
    if arrays is None or not fits(arrays):
        arrays = read()
        # A folder that cannot be written or is full only costs the next reader time.
        with contextlib.suppress(OSError), atomic_file(path) as part, part.open("wb") as file:
            np.savez(file, **{_STAMP: np.array(stamp)}, **arrays)  # type: ignore[arg-type]
    return arrays


def content_stamp(directory: Path) -> str | None:
    """A checksum of every file in `directory`, or None if it is too large or not readable."""
    digest = hashlib.sha256()
    try:
        files = sorted(path for path in directory.iterdir() if path.is_file())
        if sum(path.stat().st_size for path in files) > _MOST_BYTES:
            return None
        for path in files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0{_crc(path)}\0".encode(errors="surrogateescape"))
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


def _load(path: Path, stamp: str) -> Named | None:
    try:
        with path.open("rb") as file, np.load(file) as archive:  # never unpickles, and zip checks every array's CRC
            if str(archive[_STAMP]) != stamp:
                return None
            return {name: archive[name] for name in archive.files if name != _STAMP}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        return None
