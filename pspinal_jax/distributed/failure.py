"""One process fails, and all of them end soon, each with one line that says why.

Three ways lead here. A process that fails tells the others through JAX's coordination service. One that was killed or
cut off cannot: a collective operation then raises an error in the others, or, where it hangs, the coordination service
misses its heartbeats, and ends them by abort() from within. So abort() is caught here; and because a native stack trace
comes with it, what native code prints goes into a file of its own, which the line names.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from pspinal_jax.distributed.coordination import client, count, index
from pspinal_jax.errors import PSpinalError, printable

_SECONDS_TO_BE_TOLD = 2.0
"""How long a process that lost another one waits for a better explanation."""
_WATCH_MILLISECONDS = 600_000
_ending = threading.Lock()
_shows_progress = threading.Event()


def _key(process: int) -> str:
    return f"pspinal_jax/notice/{process}"


@contextlib.contextmanager
def native_output_aside(process: str) -> Iterator[Path]:
    """Send what native code prints to a file, yielded, and removed unless an error names it; Python's output stays."""
    handle, name = tempfile.mkstemp(prefix=f"pspinal-jax-process-{process}-", suffix=".log")
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        copies = {number: os.dup(number) for number in (1, 2)}
        for stream, number in (("stdout", 1), ("stderr", 2)):
            getattr(sys, stream).flush()
            setattr(sys, stream, opened.enter_context(open(os.dup(number), "w", buffering=1, errors="replace")))
            os.dup2(handle, number)
        os.close(handle)
        try:
            yield Path(name)
            os.unlink(name)
        except PSpinalError as error:
            if name not in str(error):
                os.unlink(name)
            raise
        finally:
            for number, copy in copies.items():
                os.dup2(copy, number)
                os.close(copy)
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def abort_caught(line: list[str]) -> Iterator[None]:
    """Where native code calls abort(), print the newest of `line` and exit with status 1."""

    def handler(number: int) -> None:
        _end(line[-1], 1)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, callback)
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, 0)


@contextlib.contextmanager
def ending_together(log: Path) -> Iterator[None]:
    """What is raised inside ends this process and all others; a failure of another process ends this one.

    Args:
      log: what native code prints, see `native_output_aside`.
    """
    if index() == 0:
        _shows_progress.set()
    watch = threading.Thread(target=_watch, args=(log,), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        _fail(error, log)
    client().key_value_set(_key(index()), "")
    watch.join()


def lost(log: Path, reason: str = "") -> str:
    """The line for a process that another one has left alone."""
    return (
        f"process {index()} of {count()} lost contact with another process, which has died or been cut off{reason}; "
        f"start all of them again with the same commands to go on from the last checkpoint (details in {log})"
    )


def _watch(log: Path) -> None:
    while True:
        try:
            text = client().blocking_key_value_get(_key(index()), _WATCH_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            _end(lost(log), 1)
        if text:
            notice = json.loads(text)
            failed = "failed: " if notice["status"] else ""
            _end(f"process {notice['process']} of {count()} {failed}{notice['line']}", notice["status"])
        return


def leave_together(line: str) -> None:
    """Print `line` and end this process, and soon all others, with status 0."""
    threading.Thread(target=_tell, args=(line, 0), daemon=True).start()
    _end(line, 0, seconds=_SECONDS_TO_BE_TOLD)


def _fail(error: BaseException, log: Path) -> None:
    line, status = _describe(error, log)
    threading.Thread(target=_tell, args=(line, status), daemon=True).start()
    if _is_jax(error):  # most likely because of another process, which may just be telling
        time.sleep(_SECONDS_TO_BE_TOLD)
    # The coordination service lives in process 0, and the others have yet to hear.
    _end(line, status, seconds=_SECONDS_TO_BE_TOLD)


def _describe(error: BaseException, log: Path) -> tuple[str, int]:
    if isinstance(error, PSpinalError):
        return str(error), error.exit_status
    if _is_jax(error):
        return lost(log, f" ({' '.join(str(error).split())[:200]})"), 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + signal.SIGINT
    if not isinstance(error, OSError):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error), 1


def _is_jax(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _tell(line: str, status: int) -> None:
    notice: dict[str, Any] = {"process": index(), "line": line, "status": status}
    for process in range(count()):
        if process != index():
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client().key_value_set(_key(process), json.dumps(notice), allow_overwrite=True)


def _before_a_line() -> str:
    """What gets away from a progress bar, which another thread than the main one may find."""
    return "\n" if _shows_progress.is_set() and threading.current_thread() is not threading.main_thread() else ""


def _end(line: str, status: int, seconds: float = 0.0) -> None:
    """Print the line, and exit without the shutdown of Python and JAX, which would wait for the other processes."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # another thread is at it, and ends the process
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(f"{_before_a_line()}{'error: ' if status else ''}{printable(line)}", file=sys.stderr, flush=True)
    time.sleep(seconds)
    os._exit(status)
