"""One section of `benchmark all` in a process of its own, which suite.py starts.

A section that fails, runs out of memory or out of time costs itself only. Its file is written anew after every case.
"""

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from pspinal_jax.benchmark.report import torch_version
from pspinal_jax.benchmark.sections import SECTIONS, Entry, Sizes, peak_memory, peaks, torch_is_here
from pspinal_jax.benchmark.timing import Precision, usual_precisions
from pspinal_jax.environment import device, versions
from pspinal_jax.files import write_json


def sizes_here(tiny: bool, precisions: Sequence[Precision] | None) -> Sizes:
    """The sizes for this machine; `tiny` ones walk every case in seconds and measure nothing worth knowing."""
    chosen = tuple(precisions or usual_precisions())
    if tiny:
        return Sizes(chosen, 1, 0.01, (1, 2), (2, 4), 2, 32, False, 1)
    if jax.default_backend() == "cpu":
        return Sizes(chosen)
    return Sizes(chosen, 9, 0.1, (1, 4, 16, 64, 256, 512), (4, 16, 64), 64, 224, False, 937)


def run_section(name: str, seconds: float, output: Path, sizes: Sizes) -> None:
    """Measure the cases of section `name` until `seconds` are over; write `output` after each."""
    started, entries, left_out = time.monotonic(), list[Entry](), list[str]()
    record: dict[str, Any] = {"section": name, "entries": entries, "left_out": left_out, "status": "running"}
    record |= {"device": device(), "versions": versions() | torch_version(), "cores": os.cpu_count()}

    def save(status: str) -> None:
        spent = {
            "seconds": time.monotonic() - started,
            "load_average": os.getloadavg(),
            "peak_memory_mb": peak_memory(),
        }
        write_json(output, record | spent | {"status": status})

    save("running")
    if not torch_is_here():
        left_out.append("PyTorch: torch is not installed (extra `torch`)")
    for case, measure in SECTIONS[name](sizes):
        if time.monotonic() - started > seconds:
            left_out.append(f"{case}: no time left")
            continue
        print(f"{name}: {case}", flush=True)
        try:
            entries.extend(measure())
        except Exception as error:  # one case that fails must not cost the others
            traceback.print_exc(file=sys.stdout)
            line = (str(error).strip().splitlines() or [""])[0]
            left_out.append(f"{case}: {type(error).__name__}: {line[:200]}")
        save("running")
    save("done")


def run_in_process(
    name: str,
    seconds: float,
    output: Path,
    precisions: Sequence[Precision],
    known_peaks: dict[str, float],
    tiny: bool,
) -> None:
    """What the process of section `name` runs; what it prints goes to the log beside `output`."""
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    peaks.update(known_peaks)
    run_section(name, seconds, output, sizes_here(tiny, precisions))


def _die_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
