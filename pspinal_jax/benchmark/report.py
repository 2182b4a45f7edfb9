"""The outcome of a benchmark: a table, results.json and a PNG."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from pspinal_jax.benchmark.timing import Timing, ratio
from pspinal_jax.runs.directory import write_json
from pspinal_jax.runs.versions import device, versions


def write_report(
    workdir: Path, title: str, timings: dict[str, Timing], ours: str, left_out: list[str], command: str
) -> dict[str, Any]:
    """Write results.json and a PNG into `workdir` and print the table.

    Args:
      workdir: made if missing.
      title: what one repetition is.
      timings: by alternative.
      ours: the alternative that ratios are taken against.
      left_out: alternatives that could not be measured, and why.
      command: the command that repeats this.

    Returns:
      What results.json holds.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    results = {
        "title": title,
        "command": command,
        "alternatives": {name: timing.summary() for name, timing in timings.items()},
        "times_faster": {name: ratio(timing, timings[ours]) for name, timing in timings.items() if name != ours},
        "left_out": left_out,
        "device": device(),
        "versions": versions() | _torch_version(),
    }
    write_json(workdir / "results.json", results)
    _plot(workdir / "results.png", title, results)
    print(format_table(results, ours))
    return results


def format_table(results: dict[str, Any], ours: str) -> str:
    """The results as a Markdown table."""
    lines = [
        f"{results['title']}; {results['device']['kind']}",
        "",
        "| alternative | median ms | 95 % interval | quartiles | first call s | ours is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in results["alternatives"].items():
        low, high = (1e3 * value for value in values["interval_95"])
        first, third = (1e3 * value for value in values["quartiles"])
        faster = "(ours)"
        if name != ours:
            times = results["times_faster"][name]
            faster = f"{times['median']:.2f} x ({times['interval_95'][0]:.2f} .. {times['interval_95'][1]:.2f})"
        lines.append(
            f"| {name} | {1e3 * values['median']:.3f} | {low:.3f} .. {high:.3f} | {first:.3f} .. {third:.3f} | "
            f"{values['first_call']:.2f} | {faster} |"
        )
    return "\n".join(lines + [f"left out: {reason}" for reason in results["left_out"]])


def _torch_version() -> dict[str, str]:
    try:
        import torch
    except ImportError:
        return {}
    return {"torch": torch.__version__}


def _plot(path: Path, title: str, results: dict[str, Any]) -> None:
    names = list(results["alternatives"])
    values = [results["alternatives"][name] for name in names]
    medians = [1e3 * value["median"] for value in values]
    errors = [
        [1e3 * (value["median"] - value["interval_95"][0]) for value in values],
        [1e3 * (value["interval_95"][1] - value["median"]) for value in values],
    ]
    figure, axis = plt.subplots(figsize=(8, 0.6 * len(names) + 1.4), layout="constrained")
    bars = axis.barh(names[::-1], medians[::-1], xerr=[side[::-1] for side in errors], color="#4878a8", capsize=3)
    axis.bar_label(bars, [f"{median:.2f} ms" for median in medians[::-1]], padding=6)
    axis.set_xlabel("ms (median, 95 % interval)")
    axis.set_title(f"{title}\n{results['device']['kind']}", fontsize=10)
    axis.margins(x=0.18)
    figure.savefig(path, dpi=110)
    plt.close(figure)
