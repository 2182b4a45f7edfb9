"""The command line: each module is imported when one of its commands is called. Errors of other rooms name fields."""

import contextlib
import re
from collections.abc import Iterator

from pspinal_jax.errors import PSpinalError

FLAGS: dict[str, str] = {}
"""Field -> flag of the running command, without its dashes: data.num_classes -> data.num-classes."""

_FIELD = re.compile(r"(?<![\w./-])([a-z]+(?:[._][a-z]+)*)(?:=([\w./]*\w))?(?![\w/])")


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Errors from the `with` have flags in place of fields: data.num_classes=7 becomes --data.num-classes 7.

    A bare word, such as epochs or seed, stays: it may be English.
    """
    try:
        yield
    except PSpinalError as error:
        error.args = (_FIELD.sub(_as_flag, str(error)),)
        raise


def _as_flag(found: re.Match[str]) -> str:
    field, value = found.groups()
    flag = FLAGS.get(field)
    if flag is None or (value is None and field.isalpha()):
        return found[0]
    if value in ("True", "False"):
        front, dot, last = flag.rpartition(".")
        return f"--{flag}" if value == "True" else f"--{front}{dot}no-{last}"
    return f"--{flag}" if value is None else f"--{flag} {value}"
