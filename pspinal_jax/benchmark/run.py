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
from pspinal_jax.benchmark.report import format_record, plot_entries, write_suite_report, write_tables
from pspinal_jax.benchmark.timing import Case, Precision, has_torch, machine_settings, products_in
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import RunError, UsageError, printable
from pspinal_jax.files import check_target, write_json
from pspinal_jax.progress import say

_SECONDS_TO_START = 4.0
"""A section's process needs about so long until its first case."""
_CONTEXT = multiprocessing.get_context("forkserver")
"""One process loads the libraries, before any of them has threads or a device, and each section's is its copy."""
_LOADED = ("torch", "pspinal_jax.benchmark.run", "pspinal_jax.benchmark.steps")
_GRACE_SECONDS = 30.0
"""After the time is over, for the case that has begun."""
_DONE, _NO_TIME = "done", "no time left"
_NO_TORCH = "torch is not installed (extra `torch`)"


def run_alone(
    name: str,
    workdir: Path,
    command: str,
    dtype: Precision = "float32",
    rounds: int | None = None,
    seconds_per_round: float | None = None,
    **options: Any,
) -> None:
    """Measure benchmark `name`, print its tables and write results.json, .csv and .png into `workdir`.

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
    write_tables(workdir / "results.csv", [record])
    plot_entries(workdir / "results.png", record["entries"], record["device"]["kind"])
    print(format_record(record))


def measure(
    name: str,
    cases: list[Case],
    save: Callable[[dict[str, Any]], object],
    *,
    record: dict[str, Any] | None = None,
    end: float = math.inf,
    keep_going: bool = False,
) -> dict[str, Any]:
    """Measure `cases` of benchmark `name`.

    Args:
      name: a name out of `BENCHMARKS`.
      cases: what is measured.
      save: called with the record before the first case and after every one.
      record: of cases measured before, to go on with; `further` names those that are to be measured yet.
      end: time of `time.monotonic` by which they must have ended: a further case is begun if that is to be expected.
      keep_going: whether a case that fails is left out, too.

    Returns:
      The record.

    Raises:
      RunError: if the alternatives compute different results: their timings would compare different work.
    """
    started = time.monotonic()
    record = record or _empty(name)
    entries, left_out, further, before = (record[each] for each in ("entries", "left_out", "further", "seconds"))
    record |= {"status": "running", "device": device(), "versions": versions() | _other_versions()}
    record["cores"] = os.cpu_count()

    def update() -> None:
        record["seconds"], record["load_average"] = before + time.monotonic() - started, os.getloadavg()
        record.update(_peak_memory())
        save(record)

    if not keep_going and not has_torch():  # `benchmark all` says it once
        left_out.append(f"PyTorch: {_NO_TORCH}")
        say(f"left out: {left_out[0]}")
    update()
    for case in cases:
        begun = time.monotonic()
        if case.further and begun + case.times * record.get("comparison_seconds", 0.0) > end:
            continue
        say(f"{name}: {case.name}")
        further[:] = [each for each in further if each != case.name]
        try:
            with products_in(case.precision):
                entry = case.run()
            if entry is not None:
                _add(entries, entry)
                record.setdefault("comparison_seconds", time.monotonic() - begun)
        except Exception as error:
            if not keep_going or isinstance(error, RunError):
                raise
            traceback.print_exc()
            left_out.append(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        update()
    record["status"] = _DONE
    update()
    return record


def _add(entries: list[Any], entry: Any) -> None:
    """Add an entry, in place of one of the same title whose alternatives are all in it."""
    names = entry.get("alternatives", {}).keys()
    entries[:] = [
        each
        for each in entries
        if each["title"] != entry["title"] or not each.get("alternatives") or each["alternatives"].keys() - names
    ]
    entries.append(entry)


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

    First the comparison with PyTorch of every section, then further sizes and arithmetics, as far as the time goes.

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
    left_out = [] if has_torch() else [f"PyTorch in all sections: {_NO_TORCH}"]
    for reason in left_out:
        say(f"left out: {reason}")
    about = {"command": command, "minutes": minutes, "date": time.strftime("%Y-%m-%d"), "left_out": left_out}
    end, failed = time.monotonic() + 60 * minutes, set[str]()
    planned, spent = 0.0, 0.0  # on a slow machine every section takes longer than it is expected to
    # The shortest comparisons first, so that as many sections as can be have theirs.
    for further, order in ((False, sorted(names, key=SECTIONS.__getitem__)), (True, names)):
        for number, name in enumerate(order):
            path, latest = workdir / f"{name}.json", end + _GRACE_SECONDS * (not further)
            begun, left = _read(path), end - time.monotonic()
            needed = SECTIONS[name] * (spent / planned if planned else 1.0)
            if further:
                needed = _SECONDS_TO_START + begun.get("comparison_seconds", 0.0)
            fits = time.monotonic() + needed < latest
            if further and (name in failed or not begun.get("further") or not fits):
                continue
            seconds = max(needed, left * SECTIONS[name] / sum(SECTIONS[other] for other in order[number:]))
            what = f"{', further cases' if further else ''}: " + (f"about {seconds:.0f} s" if fits else _NO_TIME)
            say(f"[{number + 1}/{len(names)}] {name}{what}")
            arguments = (name, seconds, path, tuple(precisions), _peaks(workdir), tiny, further)
            start = time.monotonic()
            status = _run_section(arguments, end + _GRACE_SECONDS) if fits else _NO_TIME
            if fits:
                planned, spent = planned + SECTIONS[name], spent + time.monotonic() - start
            if not status.startswith((_DONE, _NO_TIME)):
                failed.add(name)
            write_json(path, _empty(name) | _read(path) | {"status": status})
            write_suite_report(workdir, about)
    print(printable(workdir / "report.md"), flush=True)
    return len(failed)


def _empty(name: str) -> dict[str, Any]:
    """The record of a section before its first case."""
    return {"section": name, "entries": [], "left_out": [], "further": [], "seconds": 0.0}


def _peaks(workdir: Path) -> dict[str, float]:
    rates = _read(workdir / "machine.json").get("entries", [])
    return {entry["precision"]: entry["flops_per_second"] for entry in rates}


def _run_section(arguments: tuple[Any, ...], latest: float) -> str:
    """Run `section` with these arguments; 'done', or in a few words why not."""
    name, seconds = arguments[:2]
    process = _CONTEXT.Process(target=section, args=arguments, daemon=True)
    process.start()
    # A case that has begun may end; what hangs may not take the others' time.
    left = latest - time.monotonic()
    patience = min(4.0 * seconds + 60.0, left)
    process.join(patience)
    status = process.exitcode
    process.kill()
    process.join()
    if status is None:
        return f"{_NO_TIME + ': ' if patience == left else ''}stopped after {patience:.0f} s"
    return _DONE if status == 0 else f"failed with exit status {status}, see {name}.log"


def section(
    name: str,
    seconds: float,
    output: Path,
    precisions: Sequence[Precision],
    peaks: dict[str, float],
    tiny: bool,
    further: bool,
) -> None:
    """What the process of section `name` runs; what it prints goes to the log beside `output`."""
    end = time.monotonic() + seconds
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | (os.O_APPEND if further else os.O_TRUNC))
    os.dup2(log, 1)
    os.dup2(log, 2)
    cases = BENCHMARKS[name].make_cases(machine_settings(precisions, tiny, peaks=peaks, deadline=end))
    later = [case.name for case in cases if case.further]
    record = _empty(name) | (_read(output) if further else {"further": later})
    asked = [case for case in cases if (case.name in record["further"] if further else not case.further)]
    measure(name, asked, lambda found: write_json(output, found), record=record, end=end, keep_going=True)


def _end_with_the_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where a section that was stopped wrote none."""
    return dict(json.loads(path.read_text())) if path.exists() else {}
