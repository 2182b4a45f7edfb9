"""Which pictures can be decoded: each is decoded once, several at a time."""

import collections
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from pspinal_jax.data.photos.photos import Encoded
from pspinal_jax.errors import DataError
from pspinal_jax.processes.agree import is_primary

_SIZE = (16, 16)  # every byte is decoded whatever the size, and resizing costs least so
_MOST_THREADS = 8
_AHEAD = 4
"""Pictures in memory at once, per thread."""
_NAMED = 5


class Checked(NamedTuple):
    """A picture that was decoded once.

    Attributes:
      data: its bytes; empty if they could not be read.
      crc: their checksum.
      problem: why it cannot be used, or None if it can.
    """

    data: bytes
    crc: int
    problem: str | None


def check(encoded: Encoded, indices: Iterable[int]) -> Iterator[Checked]:
    """Read and decode the pictures at `indices` ahead of use, in that order, on a few threads."""
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
    from pspinal_jax.data.photos.decode import decode  # loads Pillow, and `prepare --help` has no need of it

    try:
        data = encoded[index]
    except (OSError, DataError) as error:
        return Checked(b"", 0, str(error))
    try:
        decode(data, _SIZE)
    except DataError as error:
        return Checked(data, zlib.crc32(data), str(error))
    return Checked(data, zlib.crc32(data), None)


def warn_of_skipped(names: Sequence[str], source: str) -> None:
    """Say on standard error how many pictures of `source` are left out, and the first of them."""
    if names and is_primary():
        print(f"warning: {skipped_text(names, source)}; left out", file=sys.stderr)


def skipped_text(names: Sequence[str], source: str) -> str:
    """One line that counts and names the pictures of `source` that cannot be decoded."""
    first = ", ".join(names[:_NAMED]) + (", .." if len(names) > _NAMED else "")
    return f"{len(names)} picture{'s' if len(names) > 1 else ''} of {source} cannot be decoded: {first}"
