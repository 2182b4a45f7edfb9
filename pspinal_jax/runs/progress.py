"""Progress on standard error: steps, rate, loss, time left."""

import sys

from tqdm import tqdm

from pspinal_jax.processes.agree import is_primary

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal; elsewhere a line every ten seconds; from process 0 only. Use in a `with`."""

    def __init__(self, total_steps: int, done: int, description: str) -> None:
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
