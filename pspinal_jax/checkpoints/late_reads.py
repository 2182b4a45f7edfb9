"""Silence for reads that finish after Orbax has given up on a damaged checkpoint.

Orbax closes its event loop on the first array that it cannot read; tensorstore then reports every other one to the
closed loop, and Python prints a traceback for each, for nothing that anyone could act on.
"""

import sys
from typing import Any

_installed = False


def ignore_late_reads() -> None:
    """From now on, say nothing of 'Event loop is closed' errors that no code could catch."""
    global _installed
    if _installed:
        return
    _installed = True
    report = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        late = isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)
        if not late:
            report(unraisable)

    sys.unraisablehook = filtered
