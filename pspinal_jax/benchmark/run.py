"""One benchmark, from its cases to its record: `benchmark NAME` here, a section of `benchmark all` in its own process.

A section that fails, runs out of memory or out of time costs itself only. Its file is written anew after every case.
"""

import dataclasses
import math
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pspinal_jax.benchmark.measurement import (
    Case,
    Entry,
    has_torch,
    machine_settings,
    peak_memory,
    peer_versions,
    torch_peak_memory,
)
from pspinal_jax.benchmark.registry import BENCHMARKS
from pspinal_jax.benchmark.report import format_record, plot_entries, results_of
from pspinal_jax.benchmark.timing import Precision
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import RunError
from pspinal_jax.files import write_json
from pspinal_jax.progress import say

NO_TORCH = "PyTorch: torch is not installed (extra `torch`)"


def run_alone(
    name: str,
    workdir: Path,
    command: str,
    dtype: Precision = "float32",
    rounds: int | None = None,
    seconds_per_round: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure benchmark `name`, print its tables and write results.json and results.png into `workdir`.

    Args:
      name: a name out of `BENCHMARKS`.
      workdir: made if missing.
      command: what was typed.
      dtype: the arithmetic.
      rounds: how often each alternative is timed.
      seconds_per_round: about how long each timing takes.
      options: others of the benchmark's cases.

    Returns:
      What results.json holds.

    Raises:
      RunError: if the alternatives compute different results, or a measured program fails.
    """
    benchmark, settings = BENCHMARKS[name], machine_settings((dtype,))
    given = {"rounds": rounds, "seconds_per_round": seconds_per_round}
    given = {field: value for field, value in given.items() if value is not None}
    settings = dataclasses.replace(settings, quick=False, **given)  # type: ignore[arg-type]
    cases = benchmark.make_cases(settings, **options)
    if benchmark.against_peak:
        cases = BENCHMARKS["machine"].make_cases(settings) + cases
    workdir.mkdir(parents=True, exist_ok=True)

    def save(record: dict[str, Any]) -> None:
        if record["entries"]:
            write_json(workdir / "results.json", results_of(record, command))

    record = measure(name, cases, save)
    plot_entries(workdir / "results.png", record["entries"], record["device"]["kind"])
    results = results_of(record, command)
    print(format_record(record, results.get("geometric_mean_times_faster", {})))
    return results


def measure(
    name: str,
    cases: list[Case],
    save: Callable[[dict[str, Any]], object],
    *,
    seconds: float = math.inf,
    peaks: dict[str, float] | None = None,
    keep_going: bool = False,
) -> dict[str, Any]:
    """Measure `cases` of benchmark `name`.

    Args:
      name: a name out of `BENCHMARKS`.
      cases: what is measured; those for which no time is left are left out.
      save: called with the record before the first case and after every one.
      seconds: the time.
      peaks: operations a second of products by precision, where they are known already.
      keep_going: whether a case that fails is left out, too.

    Returns:
      The record.

    Raises:
      RunError: if the alternatives compute different results: their timings would compare different work.
    """
    started, entries, left_out, peaks = time.monotonic(), list[Entry](), list[str](), dict(peaks or {})
    record: dict[str, Any] = {"section": name, "entries": entries, "left_out": left_out, "status": "running"}
    record |= {"device": device(), "versions": versions() | peer_versions(), "cores": os.cpu_count()}

    def update() -> None:
        record["seconds"], record["load_average"] = time.monotonic() - started, os.getloadavg()
        record["peak_memory_mb"], record["torch_peak_memory_mb"] = peak_memory(), torch_peak_memory()
        save(record)

    if BENCHMARKS[name].against_torch and not has_torch():
        left_out.append(NO_TORCH)
        say(f"left out: {NO_TORCH}")
    update()
    for case, work in cases:
        if time.monotonic() - started > seconds:
            left_out.append(f"{case}: no time left")
            continue
        say(f"{name}: {case}")
        try:
            new = work()
        except Exception as error:
            if not keep_going or isinstance(error, RunError):
                raise
            traceback.print_exc()
            line = (str(error).strip().splitlines() or [""])[0]
            left_out.append(f"{case}: {type(error).__name__}: {line[:200]}")
        else:
            _compare_with_peaks(new, peaks)
            entries.extend(new)
        update()
    record["status"] = "done"
    update()
    return record


def _compare_with_peaks(entries: list[Entry], peaks: dict[str, float]) -> None:
    for entry in entries:
        if entry["kind"] == "peak":
            peaks[entry["precision"]] = entry["flops_per_second"]
        elif entry["kind"] == "timings" and entry["precision"] in peaks:
            for values in entry["alternatives"].values():
                values["share_of_peak"] = entry["flops"] / values["median"] / peaks[entry["precision"]]


def run_section(
    name: str, seconds: float, output: Path, precisions: Sequence[Precision], peaks: dict[str, float], tiny: bool
) -> None:
    """What the process of section `name` runs; what it prints goes to the log beside `output`."""
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    cases = BENCHMARKS[name].make_cases(machine_settings(precisions, tiny))
    measure(name, cases, lambda record: write_json(output, record), seconds=seconds, peaks=peaks, keep_going=True)


def _die_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
