"""One process at a time in a folder."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(folder: Path, waiting_for: str) -> Iterator[bool]:
    """Hold `folder` (made if need be) for this process; the lock goes with the process, however that ends.

    Args:
      folder: what to hold.
      waiting_for: said on standard error when another process holds it.

    Yields:
      Whether the lock is held: not every file system has locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(handle, waiting_for)
    finally:
        os.close(handle)


def _lock(handle: int, waiting_for: str) -> bool:
    try:
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is {waiting_for}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return False
    return True
