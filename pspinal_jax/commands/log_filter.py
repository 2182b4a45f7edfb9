"""TFDS and Orbax tell at every start, through absl's log, what a user of the command line can do nothing about."""

import logging
from pathlib import Path


def quiet_absl() -> None:
    """Let only errors of absl's logger through, and none of Orbax, which raises them too."""
    import absl.logging  # noqa: F401  # makes the logger, of its own class, which tells where a message comes from

    logging.getLogger("absl").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR and "orbax" not in Path(record.pathname).parts
