"""Progress and warnings on standard error, which ends nothing: it may be closed, full, or a pipe that nobody reads.

Progress is live on a terminal, elsewhere a line every ten seconds.
"""

import contextlib
import sys
from typing import Any

from pspinal_jax.errors import printable

_SECONDS_BETWEEN_LINES = 10.0


class Unfailing:
    """A text stream that drops what cannot be written; None, as Python has for a closed one, drops everything."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write `text`, as far as that goes."""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # full or broken, closed, None
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, as far as that goes."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return bool(self.stream.isatty())
        except (ValueError, AttributeError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def say(line: str) -> None:
    """Print `line` on standard error; what is not printable in it, as its escape."""
    print(printable(line), file=Unfailing(sys.stderr), flush=True)


def warn(line: str) -> None:
    """Print `line` on standard error as a warning."""
    say(f"warning: {line}")


def progress_bar(
    total: int | None,
    description: str,
    unit: str,
    shown: bool,
    *,
    initial: int = 0,
    unit_scale: bool = True,
    delay: float = 0.0,
) -> Any:
    """A tqdm bar, to be used in a `with`.

    Args:
      total: how much there is to do, None if that is not known.
      description: what is being done.
      unit: of what, 'B' for bytes.
      shown: False for a bar that prints nothing.
      initial: how much is done already.
      unit_scale: whether to write 1.2k for 1200.
      delay: seconds after which it appears, if it is still needed then.
    """
    from tqdm import tqdm  # not needed by who only measures

    stream = Unfailing(sys.stderr)
    return tqdm(
        total=total,
        desc=printable(description),
        unit=unit,
        unit_scale=unit_scale,
        initial=initial,
        file=stream,
        dynamic_ncols=True,
        mininterval=0.1 if stream.isatty() else _SECONDS_BETWEEN_LINES,
        disable=not shown,
        delay=delay,
    )


class StepProgress:
    """The bar of a training: steps, rate, time left, loss and accuracy. Use in a `with`."""

    def __init__(self, total: int | None, done: int, description: str, shown: bool) -> None:
        self._bar = progress_bar(total, description, "step", shown, initial=done, unit_scale=False)

    def __enter__(self) -> "StepProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, steps: int, **values: str) -> None:
        """Count `steps` more, and show `values` (loss, accuracy) beside them."""
        if values:
            self._bar.set_postfix(values, refresh=False)
        self._bar.update(steps)
