"""Progress on standard error: live on a terminal, elsewhere a line every ten seconds."""

import sys
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


def progress_bar(
    total: int | None, description: str, unit: str, shown: bool, *, initial: int = 0, unit_scale: bool = True
) -> Any:
    """A tqdm bar, to be used in a `with`.

    Args:
      total: how much there is to do, None if that is not known.
      description: what is being done.
      unit: of what, 'B' for bytes.
      shown: False for a bar that prints nothing.
      initial: how much is done already.
      unit_scale: whether to write 1.2k for 1200.
    """
    from tqdm import tqdm  # not needed by who only measures

    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit_scale,
        initial=initial,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
        disable=not shown,
    )


class StepProgress:
    """The bar of a training: steps, rate, time left, loss and accuracy. Use in a `with`."""

    def __init__(self, total: int, done: int, description: str, shown: bool) -> None:
        self._bar = progress_bar(total, description, "step", shown, initial=done, unit_scale=False)

    def __enter__(self) -> "StepProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, steps: int, **values: str) -> None:
        """Count `steps` more, and show `values` (loss, accuracy) beside them."""
        if values:
            self._bar.set_postfix(values, refresh=False)
        self._bar.update(steps)
