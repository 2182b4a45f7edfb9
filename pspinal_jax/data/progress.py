"""Progress of downloads and of writing examples, on standard error."""

import sys
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


def progress_bar(total: int | None, description: str, unit: str, shown: bool) -> Any:
    """A tqdm bar, to be used in a `with`: live on a terminal, elsewhere a line every ten seconds.

    Args:
      total: how much there is to do, None if that is not known.
      description: what is being done.
      unit: of what, 'B' for bytes.
      shown: False for a bar that prints nothing.
    """
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
        disable=not shown,
    )
