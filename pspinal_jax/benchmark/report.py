"""The outcome of a benchmark: tables, results.json and a PNG."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspinal_jax.benchmark.timing import Timing, ratio
from pspinal_jax.environment import device, versions
from pspinal_jax.files import write_json


class Measurement(NamedTuple):
    """Alternatives timed side by side.

    Attributes:
      title: what one repetition is.
      timings: by alternative.
      ours: the alternative that ratios are taken against.
      flops: floating-point operations of one repetition's matrix products.
    """

    title: str
    timings: dict[str, Timing]
    ours: str
    flops: int


def write_report(
    workdir: Path, measurements: list[Measurement], left_out: list[str], command: str, roofline: dict[str, float]
) -> dict[str, Any]:
    """Write results.json and results.png into `workdir` and print the tables.

    Args:
      workdir: made if missing.
      measurements: what was timed.
      left_out: alternatives that could not be measured, and why.
      command: the command that repeats this.
      roofline: flops_per_second and bytes_per_second of this machine.

    Returns:
      What results.json holds.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": command,
        "measurements": [summarize(measurement, roofline["flops_per_second"]) for measurement in measurements],
        "geometric_mean_times_faster": _geometric_means(measurements),
        "left_out": left_out,
        "roofline": roofline,
        "device": device(),
        "versions": versions() | torch_version(),
    }
    write_json(workdir / "results.json", results)
    plot_timings(workdir / "results.png", results["measurements"], results["device"]["kind"])
    print(format_report(results))
    return results


def summarize(measurement: Measurement, peak: float | None) -> dict[str, Any]:
    """What results.json says of a measurement; `peak` is the machine's rate of products, None where it is not known."""
    ours = measurement.timings[measurement.ours]
    alternatives = {}
    for name, timing in measurement.timings.items():
        summary = timing.summary()
        share = None if peak is None else measurement.flops / summary["median"] / peak
        alternatives[name] = summary | {"share_of_peak": share}
    return {
        "title": measurement.title,
        "ours": measurement.ours,
        "flops": measurement.flops,
        "alternatives": alternatives,
        "times_faster": {
            name: ratio(timing, ours) for name, timing in measurement.timings.items() if name != measurement.ours
        },
    }


def _geometric_means(measurements: list[Measurement]) -> dict[str, float]:
    """By alternative, how many times faster ours is in the geometric mean over all measurements."""
    names = [name for name in measurements[0].timings if name != measurements[0].ours]
    return {
        name: float(
            np.exp(np.mean([np.log(ratio(m.timings[name], m.timings[m.ours])["median"]) for m in measurements]))
        )
        for name in names
    }


def format_report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    parts = [format_table(measurement) for measurement in results["measurements"]]
    if len(results["measurements"]) > 1:
        means = ", ".join(f"{name} {value:.2f} x" for name, value in results["geometric_mean_times_faster"].items())
        parts.append(f"ours is faster, geometric mean: {means}")
    roofline = results["roofline"]
    parts.append(
        f"{results['device']['kind']}: matrix products {roofline['flops_per_second'] / 1e9:.0f} GFLOP/s, "
        f"copies {roofline['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    return "\n\n".join(parts + [f"left out: {reason}" for reason in results["left_out"]])


def format_table(measurement: dict[str, Any]) -> str:
    """One measurement as a Markdown table."""
    lines = [
        measurement["title"],
        "",
        "| alternative | median ms | 95 % interval | quartiles | of peak | first call s | ours is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in measurement["alternatives"].items():
        low, high = (1e3 * value for value in values["interval_95"])
        first, third = (1e3 * value for value in values["quartiles"])
        faster = "(ours)"
        if name != measurement["ours"]:
            times = measurement["times_faster"][name]
            faster = f"{times['median']:.2f} x ({times['interval_95'][0]:.2f} .. {times['interval_95'][1]:.2f})"
        share = "" if values["share_of_peak"] is None else f"{100 * values['share_of_peak']:.0f} %"
        lines.append(
            f"| {name} | {1e3 * values['median']:.3f} | {low:.3f} .. {high:.3f} | {first:.3f} .. {third:.3f} | "
            f"{share} | {values['first_call']:.2f} | {faster} |"
        )
    return "\n".join(lines)


def torch_version() -> dict[str, str]:
    """PyTorch's version if it is installed, beside those of `versions`."""
    try:
        import torch
    except ImportError:
        return {}
    return {"torch": torch.__version__}


def plot_timings(path: Path, measurements: list[dict[str, Any]], title: str) -> None:
    """Write horizontal bars as a PNG, a panel for each of the summaries in `measurements`."""
    from matplotlib.figure import Figure

    heights = [0.36 * len(measurement["alternatives"]) + 0.9 for measurement in measurements]
    figure = Figure(figsize=(8, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(measurements), 1, height_ratios=heights, squeeze=False)
    for axis, measurement in zip(axes[:, 0], measurements, strict=True):
        _bars(axis, measurement)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def plot_bars(path: Path, rows: dict[str, list[float]], unit: str, title: str) -> None:
    """Write a PNG with a bar for the median of each row of `rows` and a dot for each of its values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.4 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for name, values in reversed(rows.items()):
        median = float(np.median(values))
        axis.barh(name, median, color="#4878a8")
        axis.plot(values, [name] * len(values), "k.", markersize=4)
        text = f"{median:.1f} {unit}"
        axis.annotate(text, (max(values), name), xytext=(6, 0), textcoords="offset points", va="center")
    axis.margins(x=0.15)
    axis.set_title(textwrap.fill(title, 100), fontsize=8)
    figure.savefig(path, dpi=110)


def _bars(axis: Any, measurement: dict[str, Any]) -> None:
    names = list(measurement["alternatives"])[::-1]
    values = [measurement["alternatives"][name] for name in names]
    medians = [1e3 * value["median"] for value in values]
    errors = [
        [1e3 * (value["median"] - value["interval_95"][0]) for value in values],
        [1e3 * (value["interval_95"][1] - value["median"]) for value in values],
    ]
    bars = axis.barh(names, medians, xerr=errors, color="#4878a8", capsize=3)
    axis.bar_label(bars, [f"{median:.2f} ms" for median in medians], padding=6, fontsize=8)
    axis.set_title(f"{measurement['title']} (median, 95 % interval)", fontsize=9)
    axis.margins(x=0.2)
    if max(medians) > 30 * min(medians):
        axis.set_xscale("log")
