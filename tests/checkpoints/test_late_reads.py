"""What tensorstore reports to a closed event loop is dropped; everything else still is told."""

import sys
from types import SimpleNamespace

from pspinal_jax.checkpoints import late_reads


def test_only_late_reads_are_dropped(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(late_reads, "_installed", False)
    late_reads.ignore_late_reads()
    late_reads.ignore_late_reads()
    errors = [RuntimeError("Event loop is closed"), RuntimeError("another"), ValueError("Event loop is closed")]
    for error in errors:
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert [unraisable.exc_value for unraisable in told] == errors[1:]
