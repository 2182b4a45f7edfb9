"""Reading members of zip and tar.gz archives in place: nothing is extracted, and no path is trusted."""

import contextlib
import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from pspinal_jax.errors import DataError
from pspinal_jax.files import require_file

# RuntimeError and NotImplementedError: encrypted, or compressed in a way that Python cannot undo.
_DAMAGED = (
    *(OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, RuntimeError, NotImplementedError),
    ValueError,
)
_CHUNK = 1 << 20

MOST_BYTES = 2**30
"""That one file, or all that is kept of a tar, may have once it is unpacked; a few MB of zip can become many GB."""


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip file at `path`.

    Raises:
      DataError: if it is none, or holds a path that points outside it.
    """
    try:
        require_file(path)
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a zip file: {error}; get the file again") from error
    with archive:
        # We read entries in place and extract none; an archive that tries this is still not what it says it is.
        for name in archive.namelist():
            _refuse_outside(name, str(path))
        yield archive


def read_zip_member(archive: zipfile.ZipFile, path: Path, entry: str) -> bytes:
    """The member `entry` of the zip at `path`.

    Raises:
      DataError: if there is none, it is damaged, or unpacked it would be larger than `MOST_BYTES`.
    """
    try:
        _refuse_large(archive.getinfo(entry).file_size, f"{entry} in {path}")  # more than it says is never read
        # As a whole: read piece by piece, an entry's checksum would be skipped where gzip ends first.
        return archive.read(entry)
    except KeyError:
        raise DataError(f"{path} lacks {entry}; get the file again") from None
    except _DAMAGED as error:
        raise _cannot_be_read(f"{PurePosixPath(entry).name} in {path}", error) from error


def read_tar(stream: IO[bytes], where: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The members of a tar.gz whose path is `wanted`, as path -> contents; links and folders are passed over.

    Args:
      stream: the archive, from its start; read to its end, so that all checksums are.
      where: what to call it.
      wanted: says of a path whether to keep that member.

    Raises:
      DataError: if the archive is damaged, holds a path that points outside it, or more than `MOST_BYTES`.
    """
    members: dict[str, bytes] = {}
    size = 0
    try:
        with gzip.GzipFile(fileobj=stream) as unzipped:
            with tarfile.open(fileobj=unzipped, mode="r|") as archive:
                for member in archive:
                    _refuse_outside(member.name, where)
                    file = archive.extractfile(member) if member.isfile() and wanted(member.name) else None
                    if file is not None:
                        size += member.size
                        _refuse_large(size, where)
                        members[member.name] = file.read()
            while piece := unzipped.read(_CHUNK):
                size += len(piece)
                _refuse_large(size, where)
        while stream.read(_CHUNK):
            pass
    except _DAMAGED as error:
        raise _cannot_be_read(where, error) from error
    return members


def _refuse_large(size: int, where: str) -> None:
    if size > MOST_BYTES:
        raise DataError(f"{where} has {size} bytes unpacked, expected at most {MOST_BYTES}; get the file again")


def _refuse_outside(name: str, where: str) -> None:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts:
        raise DataError(f"{where} holds the path {name!r}, which points outside it; get the file again")


def _cannot_be_read(where: str, error: Exception) -> DataError:
    return DataError(f"{where} cannot be read: {error}; get the file again")
