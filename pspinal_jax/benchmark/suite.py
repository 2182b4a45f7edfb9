"""`benchmark all`: every benchmark in turn, each in a process of its own with its part of the time, and one report."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pspinal_jax.benchmark.registry import SECTIONS
from pspinal_jax.benchmark.report import write_suite_report
from pspinal_jax.benchmark.run import run_section
from pspinal_jax.errors import UsageError, printable
from pspinal_jax.files import check_target, write_json
from pspinal_jax.progress import say

_SECONDS_TO_START = 4.0
"""A section's process needs about so long until its first case; it comes on top of the section's own time."""
_CONTEXT = multiprocessing.get_context("forkserver")
"""One process loads the libraries, before any of them has threads or a device, and each section's is its copy."""
_LOADED = ("torch", "pspinal_jax.benchmark.run", "pspinal_jax.benchmark.steps")
_LEAST_SECONDS = 15.0
_GRACE_SECONDS = 30.0
"""After the time is over, for the case that has begun."""
_DONE, _NO_TIME = "done", "no time left"


def run_suite(
    workdir: Path,
    minutes: float,
    command: str,
    sections: Sequence[str] = (),
    precisions: Sequence[str] = (),
    tiny: bool = False,
    overwrite: bool = False,
) -> int:
    """Measure, and write a file of each section, its log, report.md and its plots into `workdir` as they come.

    Args:
      workdir: where to write.
      minutes: about how long all of it may take.
      command: what was typed.
      sections: those to measure, in the suite's order; all by default.
      precisions: see timing.py; those of the machine by default.
      tiny: the smallest sizes, to see that everything runs.
      overwrite: write over results that are there.

    Returns:
      How many sections failed, or hung and were stopped; those for which no time was left are none.

    Raises:
      UsageError: on an unknown section, too little time, or results that would be written over.
    """
    _check(workdir, minutes, sections, overwrite)
    workdir.mkdir(parents=True, exist_ok=True)
    names = [name for name in SECTIONS if name in sections or not sections]
    for name in names:
        (workdir / f"{name}.json").unlink(missing_ok=True)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch needs some of the memory too
    _CONTEXT.set_forkserver_preload(list(_LOADED))
    end, about, failed = time.monotonic() + 60 * minutes, describe_machine(command, minutes), 0
    with _stopping_on_signals():
        for number, name in enumerate(names):
            left = end - time.monotonic() - _SECONDS_TO_START * (len(names) - number)
            seconds = max(_LEAST_SECONDS, left * SECTIONS[name] / sum(SECTIONS[other] for other in names[number:]))
            busy = busy_share()
            say(f"[{number + 1}/{len(names)}] {name}: up to {seconds:.0f} s")
            status = _run(workdir, name, seconds, end + _GRACE_SECONDS, precisions, tiny)
            failed += not status.startswith((_DONE, _NO_TIME))
            _amend(workdir / f"{name}.json", name, status, busy)
            write_suite_report(workdir, about)
    print(printable(workdir / "report.md"), flush=True)
    return failed


def _check(workdir: Path, minutes: float, sections: Sequence[str], overwrite: bool) -> None:
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise UsageError(f"unknown section {unknown[0]!r} of benchmark all; there are: {', '.join(SECTIONS)}")
    if not minutes > 0:
        raise UsageError(f"--minutes is {minutes:g}, expected a positive number")
    if (workdir / "report.md").exists() and not overwrite:
        raise UsageError(f"{workdir} holds a report already; give another --workdir, or --overwrite to write over it")
    check_target(workdir, "work directory", "report.md", "suite.json")


def _run(workdir: Path, name: str, seconds: float, latest: float, precisions: Sequence[str], tiny: bool) -> str:
    """Run a section; 'done', or in a few words why not."""
    left = latest - time.monotonic()
    if left < _LEAST_SECONDS:
        return _NO_TIME
    peaks = {
        entry["precision"]: entry["flops_per_second"]
        for entry in _read(workdir / "machine.json").get("entries", [])
        if entry["kind"] == "peak"
    }
    arguments = (name, seconds, workdir / f"{name}.json", tuple(precisions), peaks, tiny)
    process = _CONTEXT.Process(target=run_section, args=arguments, daemon=True)
    process.start()
    # A case that has begun may end; what hangs may not take the others' time.
    patience = min(1.5 * seconds + 45.0, left)
    try:
        process.join(patience)
        if process.exitcode is None:
            return f"{_NO_TIME + ': ' if patience == left else ''}stopped after {patience:.0f} s"
    finally:
        process.kill()
        process.join()
    return _DONE if process.exitcode == 0 else f"failed with exit status {process.exitcode}, see {name}.log"


def _amend(path: Path, name: str, status: str, busy: float | None) -> None:
    record = {"section": name, "entries": [], "left_out": []} | _read(path)
    write_json(path, record | {"status": status, "busy_before": busy})


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """SIGTERM ends a section as Ctrl-C does: its process is killed, and what was measured stays."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def describe_machine(command: str, minutes: float) -> dict[str, Any]:
    """What the report says of where it was made: GPU and driver where nvidia-smi tells, cores, load."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        gpu = ""
    return {
        "command": command,
        "minutes": minutes,
        "date": time.strftime("%Y-%m-%d"),
        "gpu": gpu or None,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def busy_share(seconds: float = 0.5) -> float | None:
    """How much of all cores others use just now, 0 to 1; None where the system does not tell."""

    def ticks() -> tuple[int, int]:
        values = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(values), values[3] + values[4]

    try:
        before = ticks()
        time.sleep(seconds)
        after = ticks()
    except (OSError, ValueError, IndexError):
        return None
    total = after[0] - before[0]
    return 1 - (after[1] - before[1]) / total if total else None
