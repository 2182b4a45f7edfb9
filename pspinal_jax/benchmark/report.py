"""The outcome of benchmarks: Markdown tables, plots, and report.md of `benchmark all`."""

import contextlib
import json
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.benchmark import BENCHMARKS, SECTIONS
from pspinal_jax.benchmark.timing import Entry
from pspinal_jax.errors import printable
from pspinal_jax.files import write_csv, write_json, write_text
from pspinal_jax.pictures import drawn

_FAIRNESS = """\
Every section ran in a process of its own. Alternatives were timed in turn (A B C A B C ..), warm, and every clock was
read after the device was done. Figures are medians over the rounds, with the 95 % interval of the median. The first
call includes compilation. Products have the same precision in JAX and in PyTorch, which each table names: float32 is
full float32 products, tf32 lets products round their operands to TF32, bfloat16 computes layers in bfloat16 (PyTorch
by autocast) and lets what stays float32 use TF32. PyTorch's images are channels last. Inputs and parameters are
random."""


def format_record(record: dict[str, Any], left_out: bool = True) -> str:
    """The tables of one benchmark and what was left out, as Markdown; tables of one title are one."""
    tables: dict[str, list[Entry]] = {}
    for entry in record["entries"]:
        tables.setdefault(entry["title"], []).append(entry)
    parts = []
    for title, same in tables.items():
        rows = [row for entry in same for row in entry["rows"]]
        parts.append(f"{title}\n\n{_markdown(same[0]['columns'], rows)}")
        if fastest := same[-1].get("fastest_of_torch"):
            times = same[-1]["alternatives"][fastest]["times_faster"]
            parts.append(f"fastest form of PyTorch: {fastest}, {times['median']:.2f} times as long as ours")
    memory = {"XLA": record.get("peak_memory_mb"), "PyTorch": record.get("torch_peak_memory_mb")}
    facts = [record["device"]["kind"], f"{record['seconds']:.0f} s"] if "device" in record else []
    facts += [f"peak memory of {library} {peak} MB" for library, peak in memory.items() if peak]
    facts += [] if record["status"] == "done" else [record["status"]]
    facts += [f"left out: {reason}" for reason in record["left_out"]] if left_out else []
    return "\n\n".join([*parts, "; ".join(facts)])


def write_tables(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write the rows of all tables of `records` as CSV, with the columns of all of them."""
    entries = [(record["section"], entry) for record in records for entry in record["entries"]]
    columns = list(dict.fromkeys(name for _, entry in entries for name in entry["columns"]))
    rows = []
    for section, entry in entries:
        for row in entry["rows"]:
            cells = dict(zip(entry["columns"], row, strict=True))
            rows.append([section, entry["title"], *map(cells.get, columns)])
    write_csv(path, ["benchmark", "table", *columns], rows)


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def plot_entries(path: Path, entries: list[Entry], title: str) -> bool:
    """Write horizontal bars as a PNG, a panel for each unit of a table; False where nothing is plotted.

    Bars are medians of their values, which reach from the least to the greatest.
    """
    panels: dict[tuple[str, str], dict[str, list[float]]] = {}
    for entry in entries:
        for unit, rows in entry["bars"].items():
            bars = {name: [min(values), float(np.median(values)), max(values)] for name, values in rows.items()}
            panels.setdefault((entry["title"], unit), {}).update(bars)
    path.unlink(missing_ok=True)
    if not panels:
        return False
    heights = [0.36 * len(bars) + 0.9 for bars in panels.values()]
    # Tables are enough where matplotlib is not installed.
    with contextlib.suppress(ImportError), drawn(path, 8, sum(heights) + 0.5) as figure:
        axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
        for axis, ((name, unit), bars) in zip(axes[:, 0], panels.items(), strict=True):
            low, median, high = np.array(list(bars.values())[::-1]).T
            shown = axis.barh(list(bars)[::-1], median, xerr=[median - low, high - median], color="#4878a8", capsize=3)
            axis.bar_label(shown, [f"{value:,.{2 if value < 100 else 0}f}" for value in median], padding=6, fontsize=8)
            axis.margins(x=0.2)
            axis.set_xscale("log" if max(median) > 30 * min(median) else "linear")
            axis.set_title(textwrap.fill(printable(f"{name}, {unit}"), 100), fontsize=9)
        figure.suptitle(title, fontsize=10)
    return path.exists()


def write_suite_report(workdir: Path, about: dict[str, Any]) -> None:
    """Write report.md, report.csv, suite.json and a plot a section from the sections' files in `workdir`.

    Args:
      workdir: where they lie.
      about: command, minutes, date, and what is `left_out` everywhere, which the report begins with.
    """
    paths = {name: workdir / f"{name}.json" for name in SECTIONS}
    records = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    write_json(workdir / "suite.json", about | {"sections": {name: r["status"] for name, r in records.items()}})
    known: dict[str, Any] = next((record for record in records.values() if "device" in record), {})
    rows = {
        "command": f"`{printable(about['command'])}`",
        "date": about["date"],
        "device": known.get("device", {}).get("kind", "unknown"),
        "processor cores": os.cpu_count(),
        "load average": ", ".join(f"{value:.2f}" for value in known.get("load_average", [])),
        "versions": ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items()),
    }
    everywhere = [f"**Left out: {reason}.**" for reason in about.get("left_out", [])]
    parts = ["# benchmark all", *everywhere, _markdown(["", ""], list(rows.items())), _FAIRNESS]
    left_out = []
    for name, record in records.items():
        parts.append(f"## {BENCHMARKS[name].title}")
        if record["entries"] and plot_entries(workdir / f"{name}.png", record["entries"], record["device"]["kind"]):
            parts.append(f"![]({name}.png)")
        parts.append(format_record(record, left_out=False))
        reasons = [*record["left_out"], *(f"{case}: no time left" for case in record.get("further", []))]
        reasons += [] if record["entries"] else [record["status"]]
        left_out += [f"- {name}: {printable(reason)}" for reason in reasons]
    parts += ["## Left out", "\n".join(left_out) or "nothing"]
    write_tables(workdir / "report.csv", records.values())
    write_text(workdir / "report.md", "\n\n".join(parts) + "\n")
