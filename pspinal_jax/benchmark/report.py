"""The outcome of benchmarks: Markdown tables, plots, results.json of one and report.md of `benchmark all`."""

import contextlib
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.benchmark.measurement import Entry
from pspinal_jax.benchmark.registry import BENCHMARKS, SECTIONS
from pspinal_jax.errors import printable
from pspinal_jax.files import write_json, write_text
from pspinal_jax.pictures import drawn

_BUSY = 0.1
_FAIRNESS = """\
Every section ran in a process of its own. Alternatives were timed in turn (A B C A B C ..), warm, and every clock was
read after the device was done. Figures are medians over the rounds, with the 95 % interval of the median and the
quartiles. The first call includes compilation. Products have the same precision in JAX and in PyTorch, which each table
names: float32 is full float32 products, tf32 lets products round their operands to TF32, bfloat16 computes layers in
bfloat16 (PyTorch by autocast) and lets what stays float32 use TF32. PyTorch's images are channels last. Inputs are
random, parameters too."""


def results_of(record: dict[str, Any], command: str) -> dict[str, Any]:
    """What results.json holds of a `benchmark NAME`.

    Args:
      record: see `measure` of run.py.
      command: the command that repeats it.
    """
    entries = record["entries"]
    timings, peaks, tables = (
        [entry for entry in entries if entry["kind"] == kind] for kind in ("timings", "peak", "table")
    )
    results = {"command": command} | {name: value for name, value in record.items() if name != "entries"}
    if timings:
        results |= {"measurements": timings, "geometric_mean_times_faster": _geometric_means(timings)}
    if peaks:
        results["roofline"] = {name: peaks[0][name] for name in ("flops_per_second", "bytes_per_second")}
    for entry in tables:
        results = _merged(results, entry["fields"])
    return results | {"tables": [{name: entry[name] for name in ("title", "columns", "rows")} for entry in tables]}


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    deeper = {name: _merged(old[name], value) for name, value in new.items() if isinstance(old.get(name), dict)}
    return old | new | deeper


def _geometric_means(timings: list[Entry]) -> dict[str, float]:
    """By alternative, how many times faster ours is in the geometric mean over all measurements."""
    ratios: dict[str, list[float]] = {}
    for entry in timings:
        for name, times in entry["times_faster"].items():
            ratios.setdefault(name, []).append(times["median"])
    return {name: float(np.exp(np.mean(np.log(values)))) for name, values in ratios.items()}


def format_record(record: dict[str, Any], means: dict[str, float]) -> str:
    """The tables of one benchmark, the geometric `means` over them, and what was left out, as Markdown."""
    parts = format_entries(record["entries"])
    if means and sum(entry["kind"] == "timings" for entry in record["entries"]) > 1:
        faster = ", ".join(f"{name} {value:.2f} x" for name, value in means.items())
        parts.append(f"ours is faster, geometric mean: {faster}")
    return "\n\n".join([*parts, record["device"]["kind"], *(f"left out: {reason}" for reason in record["left_out"])])


def format_entries(entries: list[Entry]) -> list[str]:
    """The entries as Markdown; peaks are one table, and so are tables of one title."""
    peaks = [entry for entry in entries if entry["kind"] == "peak"]
    parts = [_format_peaks(peaks)] if peaks else []
    parts += [_format_timings(entry) for entry in entries if entry["kind"] == "timings"]
    tables: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry["kind"] == "table":
            tables.setdefault(entry["title"], []).append(entry)
    for title, same in tables.items():
        rows = [row for entry in same for row in entry["rows"]]
        parts.append(f"{title}\n\n{_markdown(same[0]['columns'], rows)}")
    return parts


def _format_peaks(peaks: list[Entry]) -> str:
    def row(entry: Entry) -> list[Any]:
        theirs = entry["torch_flops_per_second"]
        ours = entry["flops_per_second"] / 1e12, None if theirs is None else theirs / 1e12
        return [entry["precision"], *ours, round(entry["bytes_per_second"] / 1e9)]

    return _markdown(["", "JAX, TFLOP/s", "PyTorch, TFLOP/s", "copies, GB/s"], map(row, peaks))


def _format_timings(entry: Entry) -> str:
    def row(name: str, values: dict[str, Any]) -> list[Any]:
        low, high, first, third = (1e3 * value for value in (*values["interval_95"], *values["quartiles"]))
        share, times = values["share_of_peak"], entry["times_faster"].get(name)
        return [
            name,
            f"{1e3 * values['median']:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{first:.3f} .. {third:.3f}",
            None if share is None else f"{100 * share:.0f} %",
            f"{values['first_call']:.2f}",
            round(values["examples_per_second"]),
            "{median:.2f} x ({interval_95[0]:.2f} .. {interval_95[1]:.2f})".format_map(times) if times else "(ours)",
        ]

    columns = [
        "alternative",
        "median ms",
        "95 % interval",
        "quartiles",
        "of peak",
        "first call s",
        "examples/s",
        "ours is faster by",
    ]
    return f"{entry['title']}\n\n{_markdown(columns, (row(*item) for item in entry['alternatives'].items()))}"


def _markdown(columns: Sequence[str], rows: Any) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plot_entries(path: Path, entries: list[Entry], title: str) -> bool:
    """Write horizontal bars as a PNG, a panel for each timing and each unit of a table; False where nothing is plotted.

    Timings have the 95 % interval of their median; other bars are medians, which reach from the least to the greatest.
    """
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        if entry["kind"] == "timings":
            bars = {
                name: [1e3 * value for value in (values["interval_95"][0], values["median"], values["interval_95"][1])]
                for name, values in entry["alternatives"].items()
            }
            panels[f"{entry['title']} (median, 95 % interval)", "ms"] = bars
        for unit, rows in entry.get("bars", {}).items():
            bars = {name: [min(values), float(np.median(values)), max(values)] for name, values in rows.items()}
            panels.setdefault((entry["title"], unit), {}).update(bars)
    with contextlib.suppress(OSError):
        path.unlink()
    if not panels:
        return False
    heights = [0.36 * len(bars) + 0.9 for bars in panels.values()]
    # Tables are enough where matplotlib is not installed.
    with contextlib.suppress(ImportError), drawn(path, 8, sum(heights) + 0.5) as figure:
        axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
        for axis, ((name, unit), bars) in zip(axes[:, 0], panels.items(), strict=True):
            _plot_bars(axis, bars, unit)
            axis.set_title(textwrap.fill(printable(name), 100), fontsize=9)
        figure.suptitle(title, fontsize=10)
    return path.exists()


def _plot_bars(axis: Any, bars: dict[str, list[float]], unit: str) -> None:
    names = list(bars)[::-1]
    low, median, high = np.array([bars[name] for name in names]).T
    shown = axis.barh(names, median, xerr=[median - low, high - median], color="#4878a8", capsize=3)
    labels = [f"{value:,.{2 if value < 100 else 0}f} {unit}" for value in median]
    axis.bar_label(shown, labels, padding=6, fontsize=8)
    axis.margins(x=0.2)
    if max(median) > 30 * min(median):
        axis.set_xscale("log")


def write_suite_report(workdir: Path, about: dict[str, Any]) -> None:
    """Write report.md, suite.json and a plot a section from the sections' files in `workdir`.

    Args:
      workdir: where they lie.
      about: the machine, see `describe_machine`.
    """
    records = {}
    for name in SECTIONS:
        try:
            records[name] = json.loads((workdir / f"{name}.json").read_text())
        except (OSError, ValueError):
            continue
    write_json(workdir / "suite.json", about | {"sections": {name: r["status"] for name, r in records.items()}})
    parts = ["# benchmark all", _header(about, records), _FAIRNESS, *_warnings(records)]
    for name, record in records.items():
        parts += _section(workdir, name, record)
    write_text(workdir / "report.md", "\n\n".join(parts) + "\n")


def _header(about: dict[str, Any], records: dict[str, Any]) -> str:
    known: dict[str, Any] = next((record for record in records.values() if "device" in record), {})
    rows = {
        "command": f"`{printable(about['command'])}`",
        "date": about["date"],
        "device": known.get("device", {}).get("kind", "unknown"),
        "GPU, driver, memory": about["gpu"] or "none",
        "processor cores": about["cores"],
        "load average at the start": ", ".join(f"{value:.2f}" for value in about["load_average"]),
        "versions": ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items()),
    }
    return _markdown(["", ""], rows.items())


def _warnings(records: dict[str, Any]) -> list[str]:
    busy = {name: record["busy_before"] for name, record in records.items() if (record.get("busy_before") or 0) > _BUSY}
    if not busy:
        return []
    worst = ", ".join(f"{name} {100 * value:.0f} %" for name, value in busy.items())
    return [
        f"**Warning: others used the cores** just before these sections ({worst} of them), so that no figure of theirs "
        "counts."
    ]


def _section(workdir: Path, name: str, record: dict[str, Any]) -> list[str]:
    parts, entries = [f"## {BENCHMARKS[name].title}"], record["entries"]
    if entries and plot_entries(workdir / f"{name}.png", entries, record["device"]["kind"]):
        parts.append(f"![]({name}.png)")
    parts += format_entries(entries)
    facts = [f"{record['seconds']:.0f} s"] if "seconds" in record else []
    memory = {"XLA": record.get("peak_memory_mb"), "PyTorch": record.get("torch_peak_memory_mb")}
    facts += [f"peak memory of {library} {peak} MB" for library, peak in memory.items() if peak]
    facts += [] if record["status"] == "done" else [record["status"]]
    return [*parts, "; ".join([*facts, *(f"left out: {reason}" for reason in record["left_out"])])]
