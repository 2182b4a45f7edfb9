"""A request to stop, from Ctrl-C or SIGTERM."""

import os
import signal
import socket
import threading
from types import FrameType


class Stopped(Exception):
    """The user asked to stop, and the run was saved."""


class StoppedEarly(KeyboardInterrupt):
    """The user asked to stop before there was anything to save. Libraries let a KeyboardInterrupt pass."""


class StopRequest:
    """Answers SIGINT and SIGTERM while used in a `with`; a second signal ends the program at once.

    At first a signal raises StoppedEarly where the program happens to be: imports, reading data. From `defer` on it is
    only remembered, and whoever can save looks at `received` between two pieces of work.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._before: dict[signal.Signals, object] = {}
        self._fd_before = -1

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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

    def defer(self) -> None:
        """From now on remember a signal instead of raising.

        Raises:
          StoppedEarly: if one came already, and somebody caught what it raised.
        """
        self._deferred = True
        if self.received is not None:
            raise StoppedEarly(self.received.name)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if not self._deferred:
            raise StoppedEarly(self.received.name)


def _end_at_the_second(numbers: socket.socket) -> None:
    """End the process at the second signal whose number arrives; return when no more can.

    In a thread, as Python calls a handler only when the main thread is back from the compiler or the device.
    """
    seen = 0
    with numbers:
        while number := numbers.recv(1):
            seen += number[0] in (signal.SIGINT, signal.SIGTERM)
            if seen == 2:
                os._exit(128 + number[0])  # as shells report a program that the signal ended
