"""What tensorstore reports to a closed event loop is dropped; everything else still is told."""

import functools
import logging
import sys
from types import SimpleNamespace

from pspinal_jax import checkpoints, progress


def test_only_late_reads_are_dropped(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    again = functools.cache(checkpoints._ignore_late_reads.__wrapped__)  # this process keeps its own filter
    again()
    again()
    errors = [RuntimeError("Event loop is closed"), RuntimeError("another"), ValueError("Event loop is closed")]
    for error in errors:
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert [unraisable.exc_value for unraisable in told] == errors[1:]


def test_only_errors_of_arrays_that_nobody_waited_for_are_dropped(caplog):
    checkpoints._ignore_late_reads()
    logger = logging.getLogger("asyncio")
    for error, message in [
        (ValueError("RESOURCE_EXHAUSTED"), "Task exception was never retrieved\nfuture: ..."),
        (RuntimeError("another"), "Task exception was never retrieved\nfuture: ..."),
        (ValueError("RESOURCE_EXHAUSTED"), "another message"),
    ]:
        logger.error(message, exc_info=(type(error), error, None))
    assert [record.exc_info[0] for record in caplog.records] == [RuntimeError, ValueError]


def test_orbax_is_quiet_and_others_are_heard(caplog):
    progress.quiet_absl()
    logger = logging.getLogger("absl")
    for folder, level in (("orbax", logging.ERROR), ("grain", logging.ERROR), ("grain", logging.WARNING)):
        path = f"/site-packages/{folder}/file.py"
        logger.handle(logging.LogRecord("absl", level, path, 1, folder, None, None))
    assert [record.msg for record in caplog.records] == ["grain"]
