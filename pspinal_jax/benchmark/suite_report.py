"""One page of all that `benchmark all` measured: report.md with its tables and plots."""

import json
from pathlib import Path
from typing import Any

from pspinal_jax.benchmark.report import format_table, plot_timings
from pspinal_jax.files import write_json, write_text

_BUSY = 0.1
TITLES = {
    "machine": "The machine's peak rates",
    "step": "A training step of the MNIST row: 784 pixels, the head, batch 64",
    "head": "The head alone, forward and backward, dropout on",
    "vgg5": "VGG-5: the KMNIST row",
    "seeds": "Seeds side by side",
    "efficientnet_lite0": "EfficientNet-Lite0 and head",
    "resnet50": "ResNet-50 and head",
    "wide_resnet101_2": "Wide-ResNet-101-2 and head",
    "depth": "Depth: compile time and run time",
    "epoch": "A whole epoch of the MNIST row",
    "augmentation": "Augmentation",
}
_FAIRNESS = """\
Every section ran in a process of its own. Alternatives were timed in turn (A B C A B C ..), warm, and every clock was
read after the device was done. Figures are medians over the rounds, with the 95 % interval of the median and the
quartiles. The first call includes compilation. JAX and PyTorch were told the same arithmetic, which each table names:
float32 is full float32 products, tf32 lets products round their operands to TF32, bfloat16 computes layers in bfloat16
(PyTorch by autocast) and lets what stays float32 use TF32. Inputs are random, parameters too."""


def write_suite_report(workdir: Path, about: dict[str, Any], order: list[str]) -> None:
    """Write report.md, suite.json and a plot a section from the sections' files in `workdir`.

    Args:
      workdir: where they lie.
      about: the machine, see `describe_machine`.
      order: names of the sections in the report's order.
    """
    records = {}
    for name in order:
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
    versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    load = ", ".join(f"{value:.2f}" for value in about["load_average"])
    rows = {
        "command": f"`{about['command']}`",
        "date": about["date"],
        "device": known.get("device", {}).get("kind", "unknown"),
        "GPU, driver, memory": about["gpu"] or "none",
        "processor cores": about["cores"],
        "load average at the start": load,
        "versions": versions,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


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
    parts = [f"## {TITLES.get(name, name)}"]
    entries = record["entries"]
    peaks = [entry for entry in entries if entry["kind"] == "peak"]
    timings = [entry for entry in entries if entry["kind"] == "timings"]
    if peaks:
        parts.append(_peaks(peaks))
    if timings:
        plotted = _plotted(workdir / f"{name}.png", timings, record)
        parts += [f"![]({name}.png)"] if plotted else []
        parts += [format_table(entry) for entry in timings]
    parts += _tables([entry for entry in entries if entry["kind"] == "table"])
    facts = [f"{record['seconds']:.0f} s"] if "seconds" in record else []
    facts += [f"peak memory of XLA {record['peak_memory_mb']} MB"] if record.get("peak_memory_mb") else []
    facts += [] if record["status"] == "done" else [record["status"]]
    parts.append("; ".join([*facts, *(f"left out: {reason}" for reason in record["left_out"])]))
    return parts


def _plotted(path: Path, timings: list[dict[str, Any]], record: dict[str, Any]) -> bool:
    try:
        plot_timings(path, timings, record["device"]["kind"])
    except ImportError:  # tables are enough where matplotlib is not installed
        return False
    return True


def _peaks(peaks: list[dict[str, Any]]) -> str:
    lines = ["| | JAX, TFLOP/s | PyTorch, TFLOP/s | copies, GB/s |", "|---|---|---|---|"]
    for entry in peaks:
        theirs = entry["torch_flops_per_second"]
        lines.append(
            f"| {entry['precision']} | {entry['flops_per_second'] / 1e12:.3g} | "
            f"{'' if theirs is None else f'{theirs / 1e12:.3g}'} | {entry['bytes_per_second'] / 1e9:.0f} |"
        )
    return "\n".join(lines)


def _tables(entries: list[dict[str, Any]]) -> list[str]:
    """Entries of one title are one table."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        tables.setdefault(entry["title"], []).append(entry)
    parts = []
    for title, same in tables.items():
        columns = same[0]["columns"]
        lines = [title, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for entry in same for row in entry["rows"]]
        parts.append("\n".join(lines))
    return parts


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
