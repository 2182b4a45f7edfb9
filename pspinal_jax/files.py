"""Atomic writes, file locks and cache paths."""

import contextlib
import csv
import errno
import json
import math
import os
import re
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.progress import say

CACHE_SWITCH = "PSPINAL_JAX_CACHE"
"""Environment variable: a folder for all caches, or 'off'."""

MAX_JSON_BYTES = 2**26
"""Size limit of the JSON files that are read back."""

_MAX_NAME_BYTES = 200
"""Bytes of a file's name that its temporary file's name keeps."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is moved to `path` at the end of the `with`, or removed on an error.

    Raises:
      OSError: if it cannot be written; what was at `path` stays.
    """
    name = os.fsdecode(os.fsencode(path.name)[:_MAX_NAME_BYTES])  # a name may be as long as a file system takes
    part = path.with_name(f"{name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all; raises as `atomic_file`."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write the JSON value `value` to `path`, indented, whole or not at all; raises as `atomic_file`."""
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """The JSON value `value` as text, with null for NaN and infinity, which JSON lacks."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table to `path`, whole or not at all; raises as `atomic_file`.

    Names of files and classes are text from strangers: a control character is written as its escape, and what a
    spreadsheet would take for a formula has an apostrophe before it, a path "./", with which it is the same file. Bytes
    that are not UTF-8 stay as they are.
    """
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([columns, *([_cell(value) for value in row] for row in rows)])


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def _cell(value: object) -> object:
    if not isinstance(value, str | Path):
        return value
    text = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))
    if not text.lstrip().startswith(_FORMULA):
        return text
    return f"./{text}" if isinstance(value, Path) else f"'{text}"


def check_target(path: Path, name: str, *inside: str) -> None:
    """Check that the file `path` can be written, as far as that can be known before; nothing is left behind.

    Args:
      path: the file, in an existing folder.
      name: the path's name in a message.
      *inside: files to be written in the folder `path`, which may have to be made, in place of `path`.

    Raises:
      UsageError: if something else than a file is in its place, or its folder does not exist.
      RunError: if it cannot be written.
    """
    files = [path.absolute() / file for file in inside] or [path.absolute()]
    folder = files[0].parent
    while inside and not os.path.lexists(folder):
        folder = folder.parent
    if not inside and not folder.is_dir():
        raise UsageError(f"{name} is {path}, but {path.parent} is not a folder")
    for file in files:
        if os.path.exists(file) and not os.path.isfile(file):
            raise UsageError(f"{name} is {path}, but {file} is not a file")
    try:
        with tempfile.TemporaryDirectory(suffix=".part", dir=folder) as probe:
            for file in files:
                target = probe / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
    except OSError as error:
        raise RunError(f"{name} {path} cannot be written: {error.strerror or error}; choose another") from error


def require_file(path: Path, max_bytes: int | None = None) -> None:
    """Check that `path` is a regular file, or a link to one: opening a pipe may never return, and a device may not end.

    Raises:
      OSError: if it is something else, has more than `max_bytes`, or does not exist.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a named pipe, a socket or a device, expected a file", str(path))
    if max_bytes is not None and status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, expected at most {max_bytes}", str(path))


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of the file `path`; raises as `require_file`, before it is opened."""
    require_file(path, max_bytes)
    with path.open("rb") as file:
        return file.read(max_bytes)  # it may grow meanwhile


@contextlib.contextmanager
def locked(folder: Path, waiting_for: str) -> Iterator[bool]:
    """Hold `folder` (made if need be) for this process; the lock goes with the process, however that ends.

    Args:
      folder: what to hold.
      waiting_for: printed on standard error when another process holds it.

    Yields:
      Whether the lock is held: not every file system has locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock = _lock(handle)
        except BlockingIOError:
            say(f"waiting for another process that is {waiting_for}")
            lock = _lock(handle, wait=True)
        yield lock
    finally:
        os.close(handle)


@contextlib.contextmanager
def held(path: Path) -> Iterator[str | None]:
    """Hold the file `path` (made if need be) for this process; the hold goes with the process, however that ends.

    Yields:
      None where it is held, or where the file system has no locks; else which process holds it.

    Raises:
      OSError: if it cannot be written.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks no file that is open for reading alone
    try:
        try:
            _lock(handle)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            other = None
        except BlockingIOError:
            other = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        yield other
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool = False) -> bool:
    """Lock a file, and return whether the file system has locks; BlockingIOError where another process has it."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise BlockingIOError(errno.EAGAIN, "another process has the lock") from error
    except (ImportError, OSError):
        return False
    return True


_PLAIN_PATH = re.compile(r"[\w ./,+=@%~-]*")


@contextlib.contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """`path`, whose folder exists, under a name that Orbax and TensorStore take within the `with`.

    They read `*`, `?` and `[` in any part of a path as patterns, and reject bytes that are not UTF-8. On Linux a
    folder has a number for a name too; elsewhere the path stays as it is.
    """
    path = path.absolute()
    if _PLAIN_PATH.fullmatch(str(path)) or not Path("/proc/self/fd").is_dir():
        yield path
        return
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{handle}") / path.name
    finally:
        os.close(handle)


def expanded(path: str | Path) -> Path:
    """`path` with ~ as the user's home.

    Raises:
      UsageError: if there is no home, or no file can have that name.
    """
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r} holds a NUL character, which no file name can have")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path} begins with ~, but no home directory is known; give the whole path") from None


def shipped(folder: str) -> Path:
    """The folder that ships with the package: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def cache_folder() -> Path | None:
    """The folder of this package's caches, which need not exist; None where caching is off.

    $PSPINAL_JAX_CACHE, or else $XDG_CACHE_HOME/pspinal_jax, or else ~/.cache/pspinal_jax; none with
    PSPINAL_JAX_CACHE=off, or for a user without a home.
    """
    choice = os.environ.get(CACHE_SWITCH)
    if choice == "off":
        return None
    if choice:
        return expanded(choice)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pspinal_jax"
    except RuntimeError:
        return None


def differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], describe: Callable[[str, Any, Any], str]
) -> list[str]:
    """`describe(name, found, expected)` for every name at which the two differ, sorted; None for what is missing."""
    names = sorted({*found, *expected})
    return [
        describe(name, found.get(name), expected.get(name)) for name in names if found.get(name) != expected.get(name)
    ]
