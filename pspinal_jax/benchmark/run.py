"""Running benchmarks: one in this process, or a section each of `benchmark all`, in processes of their own.

A section that fails, runs out of memory or out of time costs itself only. Its file is written anew after every case.
"""

import contextlib
import json
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from pspinal_jax.benchmark import BENCHMARKS, SECTIONS
from pspinal_jax.benchmark.report import format_record, plot_entries, write_suite_report
from pspinal_jax.benchmark.timing import Case, Precision, has_torch, machine_settings, set_precision
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import RunError, UsageError, printable
from pspinal_jax.files import check_target, write_json
from pspinal_jax.progress import say

_SECONDS_TO_START = 4.0
"""A section's process needs about so long until its first case; it comes on top of the section's own time."""
_CONTEXT = multiprocessing.get_context("forkserver")
"""One process loads the libraries, before any of them has threads or a device, and each section's is its copy."""
_LOADED = ("torch", "pspinal_jax.benchmark.run", "pspinal_jax.benchmark.steps")
_MIN_SECONDS = 15.0
_GRACE_SECONDS = 30.0
"""After the time is over, for the case that has begun."""
_DONE, _NO_TIME = "done", "no time left"


def run_alone(
    name: str,
    workdir: Path,
    command: str,
    dtype: Precision = "float32",
    rounds: int | None = None,
    seconds_per_round: float | None = None,
    **options: Any,
) -> None:
    """Measure benchmark `name`, print its tables and write results.json and results.png into `workdir`.

    Args:
      name: a name out of `BENCHMARKS`.
      workdir: made if missing.
      command: what was typed.
      dtype: the arithmetic.
      rounds: how often each alternative is timed.
      seconds_per_round: about how long each timing takes.
      options: others of the benchmark's cases.

    Raises:
      RunError: if the alternatives compute different results, or a measured program fails.
    """
    given: dict[str, Any] = {"rounds": rounds, "seconds_per_round": seconds_per_round}
    given = {field: value for field, value in given.items() if value is not None}
    settings = machine_settings((dtype,), quick=False, **given)
    cases = BENCHMARKS[name].make_cases(settings, **options)
    if BENCHMARKS[name].against_peak:
        cases = BENCHMARKS["machine"].make_cases(settings) + cases
    workdir.mkdir(parents=True, exist_ok=True)
    record = measure(name, cases, lambda record: write_json(workdir / "results.json", {"command": command} | record))
    plot_entries(workdir / "results.png", record["entries"], record["device"]["kind"])
    print(format_record(record))


def measure(
    name: str,
    cases: list[Case],
    save: Callable[[dict[str, Any]], object],
    *,
    seconds: float = math.inf,
    keep_going: bool = False,
) -> dict[str, Any]:
    """Measure `cases` of benchmark `name`.

    Args:
      name: a name out of `BENCHMARKS`.
      cases: what is measured; those for which no time is left after the first are left out.
      save: called with the record before the first case and after every one.
      seconds: the time.
      keep_going: whether a case that fails is left out, too.

    Returns:
      The record.

    Raises:
      RunError: if the alternatives compute different results: their timings would compare different work.
    """
    started, entries, left_out = time.monotonic(), list[Any](), list[str]()
    record: dict[str, Any] = {"section": name, "entries": entries, "left_out": left_out, "status": "running"}
    record |= {"device": device(), "versions": versions() | _other_versions(), "cores": os.cpu_count()}

    def update() -> None:
        record["seconds"], record["load_average"] = time.monotonic() - started, os.getloadavg()
        record.update(_peak_memory())
        save(record)

    if not has_torch():
        left_out.append("PyTorch: torch is not installed (extra `torch`)")
        say(f"left out: {left_out[0]}")
    update()
    for case in cases:
        if entries and time.monotonic() - started > seconds:
            left_out.append(f"{case.name}: {_NO_TIME}")
            continue
        say(f"{name}: {case.name}")
        try:
            set_precision(case.precision)
            entry = case.run()
            entries += [] if entry is None else [entry]
        except Exception as error:
            if not keep_going or isinstance(error, RunError):
                raise
            traceback.print_exc()
            left_out.append(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        update()
    record["status"] = _DONE
    update()
    return record


def _other_versions() -> dict[str, str]:
    """Versions of what is measured beside this package, where it is installed."""
    found = {}
    for name in ("pillow", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _peak_memory() -> dict[str, int | None]:
    """Megabytes that each library held at most on the first device, where that is reported."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    torch = sys.modules.get("torch")
    torch_peak = torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else None
    found = {"peak_memory_mb": peak, "torch_peak_memory_mb": torch_peak}
    return {name: None if value is None else round(value / 1e6) for name, value in found.items()}


def run_all(
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
      sections: those to measure, in the registry's order; all by default.
      precisions: see timing.py; those of the machine by default.
      tiny: the smallest sizes, to see that everything runs.
      overwrite: write over results that exist.

    Returns:
      How many sections failed, or hung and were stopped; those for which no time was left are none.

    Raises:
      UsageError: on an unknown section, too little time, or results that would be written over.
    """
    for name in sections:
        if name not in SECTIONS:
            raise UsageError(f"unknown section {name!r} of benchmark all; there are: {', '.join(SECTIONS)}")
    if not minutes > 0:
        raise UsageError(f"--minutes is {minutes:g}, expected a positive number")
    if (workdir / "report.md").exists() and not overwrite:
        raise UsageError(f"{workdir} holds a report already; give another --workdir, or --overwrite to write over it")
    check_target(workdir, "work directory", "report.md", "suite.json")
    workdir.mkdir(parents=True, exist_ok=True)
    names = [name for name in SECTIONS if name in sections or not sections]
    for name in names:
        (workdir / f"{name}.json").unlink(missing_ok=True)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch needs some of the memory too
    _CONTEXT.set_forkserver_preload(list(_LOADED))
    about = {"command": command, "minutes": minutes, "date": time.strftime("%Y-%m-%d")}
    end, failed = time.monotonic() + 60 * minutes, 0
    for number, name in enumerate(names):
        left = end - time.monotonic() - _SECONDS_TO_START * (len(names) - number)
        seconds = max(_MIN_SECONDS, left * SECTIONS[name] / sum(SECTIONS[other] for other in names[number:]))
        say(f"[{number + 1}/{len(names)}] {name}: up to {seconds:.0f} s")
        status = _run_section(workdir, name, seconds, end + _GRACE_SECONDS, precisions, tiny)
        failed += not status.startswith((_DONE, _NO_TIME))
        path = workdir / f"{name}.json"
        write_json(path, {"section": name, "entries": [], "left_out": []} | _read(path) | {"status": status})
        write_suite_report(workdir, about)
    print(printable(workdir / "report.md"), flush=True)
    return failed


def _run_section(workdir: Path, name: str, seconds: float, latest: float, precisions: Sequence[str], tiny: bool) -> str:
    """Run a section; 'done', or in a few words why not."""
    left = latest - time.monotonic()
    if left < _MIN_SECONDS:
        return _NO_TIME
    rates = _read(workdir / "machine.json").get("entries", [])
    peaks = {entry["precision"]: entry["flops_per_second"] for entry in rates}
    arguments = (name, seconds, workdir / f"{name}.json", tuple(precisions), peaks, tiny)
    process = _CONTEXT.Process(target=section, args=arguments, daemon=True)
    process.start()
    # A case that has begun may end; what hangs may not take the others' time.
    patience = min(1.5 * seconds + 45.0, left)
    process.join(patience)
    status = process.exitcode
    process.kill()
    process.join()
    if status is None:
        return f"{_NO_TIME + ': ' if patience == left else ''}stopped after {patience:.0f} s"
    return _DONE if status == 0 else f"failed with exit status {status}, see {name}.log"


def section(
    name: str, seconds: float, output: Path, precisions: Sequence[Precision], peaks: dict[str, float], tiny: bool
) -> None:
    """What the process of section `name` runs; what it prints goes to the log beside `output`."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    cases = BENCHMARKS[name].make_cases(machine_settings(precisions, tiny, peaks=peaks))
    measure(name, cases, lambda record: write_json(output, record), seconds=seconds, keep_going=True)


def _end_with_the_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where a section that was stopped wrote none."""
    return dict(json.loads(path.read_text())) if path.exists() else {}
