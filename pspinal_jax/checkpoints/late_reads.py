"""Silence for reads and writes that end after Orbax has given up on a damaged checkpoint or a full disk.

Orbax raises the first array's error and closes its event loop. tensorstore then reports every other array to the closed
loop, and Python prints a traceback for each, and for each read that is given up; asyncio does so for those whose error
nobody asked for, and warns of reads and writes that never began. All that anyone could act on is in the first.

This stays beside Orbax, and not in commands/ as other filters do: whoever opens a damaged checkpoint from Python would
read dozens of tracebacks. Each filter drops one exact message of these libraries and nothing else.
"""

import logging
import sys
import warnings
from typing import Any

_NEVER_BEGAN = r"coroutine '(Store|async_serialize).*' was never awaited"
_installed = False


def ignore_late_reads() -> None:
    """From now on, say nothing of what comes after the first error; everything else is told as before."""
    global _installed
    if _installed:
        return
    _installed = True
    report = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        error = unraisable.exc_value
        late = isinstance(error, RuntimeError) and "Event loop is closed" in str(error)
        given_up = isinstance(error.__cause__, GeneratorExit) and "reading array index" in str(error)
        if not (late or given_up):
            report(unraisable)

    sys.unraisablehook = filtered
    logging.getLogger("asyncio").addFilter(_is_news)
    warnings.filterwarnings("ignore", _NEVER_BEGAN, RuntimeWarning)


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    # A ValueError is what tensorstore raises where the operating system refuses.
    return not (isinstance(error, ValueError) and "exception was never retrieved" in record.getMessage())
