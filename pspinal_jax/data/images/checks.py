"""Which images can be decoded: each is decoded once, several at a time, and remembered from one start to the next."""

import collections
import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeAlias

from pspinal_jax.data.images.classes import first_names
from pspinal_jax.data.images.encoded import Encoded, Files
from pspinal_jax.distributed import is_primary
from pspinal_jax.errors import DataError
from pspinal_jax.files import cache_folder, write_text
from pspinal_jax.progress import progress_bar, warn

_SIZE = (16, 16)  # every byte is decoded whatever the size, and resizing costs least so
_MOST_THREADS = 8
_AHEAD = 4
"""Images in memory at once, per thread."""
_FORMAT = 2


class Checked(NamedTuple):
    """An image that was decoded once.

    Attributes:
      data: its bytes; empty if they could not be read.
      crc: their checksum.
      problem: why it cannot be used, or None if it can.
    """

    data: bytes
    crc: int
    problem: str | None


def check(encoded: Encoded, indices: Iterable[int]) -> Iterator[Checked]:
    """Read and decode the images at `indices` ahead of use, in that order, on a few threads."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    waiting: collections.deque[Future[Checked]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for index in indices:
                waiting.append(pool.submit(_check, encoded, index))
                if len(waiting) > _AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _check(encoded: Encoded, index: int) -> Checked:
    from pspinal_jax.data.images.decode import decode  # loads Pillow, and `prepare --help` has no need of it

    try:
        data = encoded[index]
    except (OSError, DataError) as error:
        return Checked(b"", 0, getattr(error, "strerror", None) or str(error))
    try:
        decode(data, _SIZE)
    except DataError as error:
        return Checked(data, zlib.crc32(data), str(error))
    return Checked(data, zlib.crc32(data), None)


def warn_of_skipped(names: Sequence[str], source: str) -> None:
    """Say on standard error how many images of `source` are left out, and the first of them."""
    if names and is_primary():
        warn(f"{skipped_text(names, source)}; left out")


def skipped_text(names: Sequence[str], source: str) -> str:
    """One line that counts and names the images of `source` that cannot be decoded."""
    return f"{len(names)} image{'s' if len(names) > 1 else ''} of {source} cannot be decoded: {first_names(names)}"


def with_reason(file: str, problem: str) -> str:
    """`file` and in brackets why it cannot be used."""
    return f"{file} ({problem.removeprefix('the image cannot be decoded: ')})"


class FileCheck(NamedTuple):
    """What is known of a file.

    Attributes:
      stamp: what changes with its content, see `_stamp`.
      crc: checksum of its bytes.
      problem: why it cannot be used, or None if it can.
    """

    stamp: tuple[int, ...]
    crc: int
    problem: str | None


FileChecks: TypeAlias = dict[str, FileCheck]


def check_files(root: Path, files: Sequence[str], show_progress: bool) -> FileChecks:
    """A check on each of `files`, paths relative to `root`; what was good and has not changed since is not read.

    The checks are stored in the user's `cache_folder`. Where they cannot be, it only takes time.
    """
    stamps = {file: _stamp(root / file) for file in files}
    place = _place(root)
    known = _load(place) if place else {}
    good = {file: check for file, check in known.items() if check.problem is None}
    checks = {file: good[file] for file in files if file in good and good[file].stamp == stamps[file]}
    new = [file for file in files if file not in checks]
    if new:
        with progress_bar(len(new), f"check images in {root.name}", "image", show_progress) as bar:
            for file, checked in zip(new, check(Files(root, new), range(len(new))), strict=True):
                checks[file] = FileCheck(stamps[file], checked.crc, checked.problem)
                bar.update()
        if place:
            _store(place, checks)
    return checks


def _stamp(path: Path) -> tuple[int, ...]:
    """Size, times and inode: whoever writes a file over can set its date, but not when that was done."""
    try:
        status = path.stat()
    except OSError:  # a link to nothing, say; reading it will tell
        return (-1, -1, -1, -1)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _place(root: Path) -> Path | None:
    folder = cache_folder()
    return folder and folder / "pictures" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.json"


def _load(place: Path) -> FileChecks:
    try:
        stored = json.loads(place.read_bytes())
        if stored["format"] != _FORMAT:
            return {}
        return {file: _parse_check(*values) for file, values in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _parse_check(stamp: list[int], crc: int, problem: str | None) -> FileCheck:
    if not all(isinstance(value, int) for value in (*stamp, crc)):
        raise TypeError("not a check")
    return FileCheck(tuple(stamp), crc, None if problem is None else str(problem))


def _store(place: Path, checks: Mapping[str, FileCheck]) -> None:
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, json.dumps({"format": _FORMAT, "files": checks}))
