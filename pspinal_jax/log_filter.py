"""Filters absl's log: TFDS and Orbax write to it at every start, and users cannot act on any of that."""

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
    import absl.logging  # noqa: F401  # makes the logger, whose class finds where a message comes from

    return logging.getLogger("absl")


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR and "orbax" not in Path(record.pathname).parts
