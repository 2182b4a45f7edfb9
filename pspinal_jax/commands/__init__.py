"""The command line. Modules are imported when one of their commands runs. Errors of other packages name fields."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence

from pspinal_jax.errors import PSpinalError

FLAGS: dict[str, str] = {}
"""Field -> flag of the running command, without leading dashes: data.num_classes -> data.num-classes."""

_FIELD = re.compile(r"(?<![\w./-])([a-z]+(?:[._][a-z]+)*)(?:=([\w./]*\w))?(?![\w/])")


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """A context whose errors name flags instead of fields: data.num_classes=7 becomes --data.num-classes 7.

    A single word such as epochs or seed stays as it is, since it may be English.
    """
    try:
        yield
    except PSpinalError as error:
        error.args = (_FIELD.sub(_as_flag, str(error)),)
        raise


def _as_flag(found: re.Match[str]) -> str:
    field, value = found.groups()
    if field not in FLAGS or (value is None and field.isalpha()):
        return found[0]
    return f"--{FLAGS[field]}" if value in (None, "True") else f"--{FLAGS[field]} {value}"


def table(rows: Iterable[Sequence[str]]) -> str:
    """`rows` of text as lines with aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
