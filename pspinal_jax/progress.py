"""Progress of downloads and of writing examples, on standard error."""

# DOC of runs/progress: """Progress on standard error: steps, rate, loss, time left."""

import sys
from typing import Any

from pspinal_jax.distributed.coordination import is_primary

_SECONDS_BETWEEN_LINES = 10.0


def progress_bar(total: int | None, description: str, unit: str, shown: bool) -> Any:
    """A tqdm bar, to be used in a `with`: live on a terminal, elsewhere a line every ten seconds.

    Args:
      total: how much there is to do, None if that is not known.
      description: what is being done.
      unit: of what, 'B' for bytes.
      shown: False for a bar that prints nothing.
    """
    from tqdm import tqdm  # not needed by who only measures

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


_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal; elsewhere a line every ten seconds; from process 0 only. Use in a `with`."""

    def __init__(self, total_steps: int, done: int, description: str) -> None:
        from tqdm import tqdm

        live = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=done,
            desc=description,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.1 if live else _SECONDS_BETWEEN_LINES,
            leave=True,
            disable=not is_primary(),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, steps: int, **values: str) -> None:
        """Book `steps` more, and show `values` (loss, accuracy) beside them."""
        if values:
            self._bar.set_postfix(values, refresh=False)
        self._bar.update(steps)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line, file=sys.stderr)
