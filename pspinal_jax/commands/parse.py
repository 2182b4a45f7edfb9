"""Parsing flags with tyro; whatever is wrong with them becomes one line."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import tyro

from pspinal_jax.errors import UsageError
from pspinal_jax.log_filter import quiet_absl

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
        with contextlib.redirect_stderr(errors):
            arguments = tyro.cli(arguments_class, default=default, args=list(args), prog=prog, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(errors.getvalue())) from None
    quiet_absl()  # the command is about to start
    return arguments


def _one_line(text: str) -> str:
    title, *lines = [" ".join(_FRAME.sub(" ", line).split()) for line in text.splitlines()]
    return " ".join(line for line in lines if line) or title
