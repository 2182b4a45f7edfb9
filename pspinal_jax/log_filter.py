"""TFDS and Orbax tell at every start, through absl's log, what a user of this package can do nothing about."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path


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
    import absl.logging  # noqa: F401  # makes the logger, of its own class, which tells where a message comes from

    return logging.getLogger("absl")


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR and "orbax" not in Path(record.pathname).parts
