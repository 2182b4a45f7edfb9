"""Errors that a user can act on. The command line prints their one line and nothing else."""

_JOINERS = "\u200c\u200d"  # a part of words in some scripts


def printable(text: object) -> str:
    """`text` on one line for a terminal, with escapes for characters that are not printable."""
    return "".join(
        char if char.isprintable() or char in _JOINERS else char.encode("unicode_escape").decode() for char in str(text)
    )


class PSpinalError(Exception):
    """An error that the user can act on: the thing, its value, what was expected, what to do."""

    exit_status = 1


class UsageError(PSpinalError):
    """The command itself asks for something that does not exist or does not fit."""

    exit_status = 2


class DataError(PSpinalError):
    """A data set is missing, unreadable or inconsistent."""


class RunError(PSpinalError):
    """A run directory or a checkpoint in it cannot be used."""
