"""Ctrl-C and SIGTERM: before a run has anything to save, and while it has."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from pspinal_jax.errors import printable

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The user asked to stop, and the run was saved."""


class StopRequest:
    """Catches SIGINT and SIGTERM while used in a `with`, for whoever can save to look at between two pieces of work.

    A second signal ends the program at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
            numbers, self._numbers = socket.socketpair()
            self._numbers.setblocking(False)
            self._fd_before = signal.set_wakeup_fd(self._numbers.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=_end_at_the_second, args=(numbers,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._before:
            signal.set_wakeup_fd(self._fd_before)
            self._numbers.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)


def _end_at_the_second(numbers: socket.socket) -> None:
    """End the process at the second signal whose number arrives; return when no more can.

    In a thread, as Python calls a handler only when the main thread is back from the compiler or the device.
    """
    seen = 0
    with numbers:
        while number := numbers.recv(1):
            seen += number[0] in _SIGNALS
            if seen == 2:
                os._exit(128 + number[0])  # as shells report a program that the signal ended


@contextlib.contextmanager
def leave_at_once(advice: str, status: int = 0) -> Iterator[None]:
    """In a `with`, SIGINT and SIGTERM end the program with `status` and a line that ends in `advice`.

    For a command that has nothing to save yet; the other processes of its run end as it is gone. It raises nothing: in
    the middle of an import, or of a library's callback, an exception would come out as another one, or as a traceback.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        line = printable(f"stopped by {signal.Signals(number).name}; {advice}")
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed or broken
            os.write(sys.stderr.fileno(), f"{line}\n".encode())  # print, in the middle of a print, would fail
        os._exit(status)

    before = {number: signal.signal(number, leave) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
