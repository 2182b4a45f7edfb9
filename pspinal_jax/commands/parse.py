"""Parsing flags with tyro; whatever is wrong with them becomes one line."""

import contextlib
import dataclasses
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from pspinal_jax.errors import UsageError
from pspinal_jax.files import expanded
from pspinal_jax.log_filter import quiet_absl

LEAST_COLUMNS, MOST_COLUMNS = 40, 400

_FRAME = re.compile(r"[╭╮╰╯│─]+|-{4,}")


def parse(
    arguments_class: type,
    args: Sequence[str],
    *,
    prog: str,
    description: str,
    default: Any = tyro.MISSING_NONPROP,
) -> Any:
    """An instance of the dataclass `arguments_class` from `args`; `--help` prints the flags and exits with 0.

    Raises:
      UsageError: on an unknown flag (with tyro's suggestion), a value of the wrong type or an unknown choice.
    """
    errors = io.StringIO()
    try:
        with _room_for_help(), contextlib.redirect_stderr(errors):
            arguments = tyro.cli(arguments_class, default=default, args=list(args), prog=prog, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(errors.getvalue())) from None
    quiet_absl()  # the command is about to start
    return _at_home(arguments)


def _at_home(value: Any) -> Any:
    """`value` with ~ as the user's home in every path in it, tuples and dataclasses included."""
    if isinstance(value, Path):
        return expanded(value)
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **{name: _at_home(inner) for name, inner in fields.items()})


@contextlib.contextmanager
def _room_for_help() -> Iterator[None]:
    """A width that tyro's help fits into: on fewer than 6 columns it never ends."""
    before, columns = os.environ.get("COLUMNS"), shutil.get_terminal_size().columns
    os.environ["COLUMNS"] = str(min(max(columns, LEAST_COLUMNS), MOST_COLUMNS))
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _one_line(text: str) -> str:
    title, *lines = [" ".join(_FRAME.sub(" ", line).split()) for line in text.splitlines()]
    return " ".join(line for line in lines if line) or title
