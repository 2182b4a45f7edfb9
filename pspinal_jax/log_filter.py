"""TFDS and Orbax tell at every start, through absl's log, what a user can do nothing about."""

import logging


def quiet_absl() -> None:
    """Let only errors of absl's logger through."""
    logging.getLogger("absl").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
