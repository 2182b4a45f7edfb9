"""Plots whose failure is a warning, and plain text on them."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pspinal_jax.errors import printable
from pspinal_jax.files import atomic_file
from pspinal_jax.progress import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_TEXT = 60


@contextlib.contextmanager
def drawn(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure (inches) that is saved to `path` at the end of the `with`. A plot that fails is one warning, no more.

    What is written on it is text, never markup.
    """
    from matplotlib.figure import Figure  # no pyplot: a notebook's backend is its own

    try:
        with plain_text():
            figure = Figure(figsize=(width, height), layout="constrained")
            yield figure
            with atomic_file(path) as part:
                figure.savefig(part, dpi=110, format=path.suffix[1:])
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        warn(f"{path} was not drawn: {reason}")


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """In a `with`, matplotlib takes text as it is, whatever the user's settings, and is silent on what does not fit."""
    import matplotlib

    with matplotlib.rc_context({"text.usetex": False, "text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def drawable(text: str, longest: int = _LONGEST_TEXT) -> str:
    """`text` on one line, with a replacement character for what the font lacks, and cut to a length that fits."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    text = printable(text)
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return "".join(char if ord(char) in glyphs else "\ufffd" for char in text)
