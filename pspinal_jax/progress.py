"""Progress and warnings on standard error, which may be closed, full, or a pipe that nobody reads.

Progress is live on a terminal, and a line every ten seconds elsewhere. What TFDS and Orbax log at every start is
filtered: users cannot act on any of that.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pspinal_jax.errors import printable

_SECONDS_BETWEEN_LINES = 10.0


class Unfailing:
    """A text stream that drops text that it cannot write; Python's None for a closed stream drops everything."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write `text`, as far as that goes."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush, as far as that goes."""
        self._try("flush")

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return bool(self._try("isatty"))

    def _try(self, method: str, *args: str) -> Any:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # full or broken, closed, None
            return getattr(self.stream, method)(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def say(line: str) -> None:
    """Print `line` on standard error, with escapes for characters that are not printable."""
    print(printable(line), file=Unfailing(sys.stderr), flush=True)


def warn(line: str) -> None:
    """Print `line` on standard error as a warning."""
    say(f"warning: {line}")


def progress_bar(total: int | None, description: str, unit: str, shown: bool, **options: Any) -> Any:
    """A tqdm bar on standard error, to be used in a `with`.

    Args:
      total: how much there is to do, None if that is not known.
      description: what is being done.
      unit: of what, 'B' for bytes.
      shown: False for a bar that prints nothing.
      **options: further ones of tqdm's.
    """
    from tqdm import tqdm  # not needed by who only measures

    stream = Unfailing(sys.stderr)
    interval = 0.1 if stream.isatty() else _SECONDS_BETWEEN_LINES
    fixed = {"unit": unit, "file": stream, "dynamic_ncols": True, "mininterval": interval, "disable": not shown}
    return tqdm(total=total, desc=printable(description), **{"unit_scale": True, **fixed, **options})


def quiet_absl() -> None:
    """Let only errors of absl's logger through, and none of Orbax, which raises them too; for the command line."""
    _absl_logger().addFilter(_is_news)


@contextlib.contextmanager
def absl_quietened() -> Iterator[None]:
    """The same within a `with`, for a process that is the user's own."""
    logger = _absl_logger()
    before = list(logger.filters)
    logger.addFilter(_is_news)
    try:
        yield
    finally:
        logger.filters[:] = before


def _absl_logger() -> logging.Logger:
    import absl.logging  # noqa: F401  # makes the logger, whose class finds where a message comes from

    return logging.getLogger("absl")


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR and "orbax" not in Path(record.pathname).parts
