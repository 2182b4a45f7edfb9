"""Parsing flags with tyro; whatever is wrong with them becomes one line."""

import contextlib
import dataclasses
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro

from pspinal_jax.commands import FLAGS
from pspinal_jax.commands.flags import flags_of, most_used
from pspinal_jax.commands.slips import what_was_meant
from pspinal_jax.errors import UsageError, printable
from pspinal_jax.files import expanded
from pspinal_jax.log_filter import quiet_absl

LEAST_COLUMNS, MOST_COLUMNS = 40, 400

_FRAME = re.compile(r"[╭╮╰╯│─]+|-{4,}")


HELP, HELP_ALL = ("-h", "--help"), "--help-all"


def parse(
    arguments_class: type,
    args: Sequence[str],
    *,
    prog: str,
    description: str,
    example: str,
    default: Any = tyro.MISSING_NONPROP,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """An instance of the dataclass `arguments_class` from `args`; `--help` prints the flags and exits with 0.

    Args:
      arguments_class: what the flags are made of.
      args: the words after the command.
      prog: the command, as the help names it.
      description: what it does.
      example: a whole command line, which ends the help.
      default: an instance of `arguments_class`.
      groups: heading -> the flags that `--help` shows under it, where there are too many; `--help-all` shows them all.

    Raises:
      UsageError: on an unknown flag (with the one that was meant), a value of the wrong type or an unknown choice.
    """
    if any(word in (*HELP, HELP_ALL) for word in args):
        short = None if HELP_ALL in args else groups
        _print_help(arguments_class, prog=prog, description=description, example=example, default=default, groups=short)
    for name in (flag.name for flag in flags_of(arguments_class)):
        FLAGS[name.replace("-", "_")] = FLAGS[name.rpartition(".")[2].replace("-", "_")] = name
    errors = io.StringIO()
    try:
        with _room_for_help(), contextlib.redirect_stderr(errors):
            arguments, unknown = tyro.cli(
                arguments_class,
                default=default,
                args=list(args),
                prog=prog,
                description=description,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(errors.getvalue())) from None
    if unknown:
        said = what_was_meant(arguments_class, unknown, args)
        raise UsageError(
            f"{printable(said)}{'' if said.endswith('?') else '.'} All flags: {prog} {HELP_ALL if groups else '--help'}"
        )
    quiet_absl()  # the command is about to start
    return _at_home(arguments)


def _print_help(
    arguments_class: type,
    *,
    prog: str,
    description: str,
    example: str,
    default: Any,
    groups: Mapping[str, Sequence[str]] | None,
) -> NoReturn:
    footer = f"example: {example}"
    if groups is not None:
        arguments_class, default, others = most_used(arguments_class, groups, default)
        footer = f"{others} more flags, and more about these: {prog} {HELP_ALL}\n{footer}"
    try:
        with _room_for_help():
            tyro.cli(arguments_class, default=default, args=["--help"], prog=prog, description=description)
    finally:
        print(footer)
    raise AssertionError("tyro printed no help")


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
