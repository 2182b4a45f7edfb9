"""`benchmark depth`: compile time and run time of the head's gradient as the number of layers grows."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pspinal_jax.benchmark.head import Case, Shape
from pspinal_jax.environment import device, versions
from pspinal_jax.files import write_json
from pspinal_jax.heads.layouts import Computed, Layout, convert_params

DEPTHS = (4, 16, 64, 256)
ALTERNATIVES: dict[str, tuple[Computed, Layout]] = {
    "unrolled": ("unrolled", "tree"),
    "fused, fused parameters": ("fused", "fused"),
    "scan, documented tree": ("scan", "tree"),
    "scan, packed parameters": ("scan", "packed"),
}
DEEPEST = {"unrolled": 256, "fused": 64, "scan": 1024}
"""The most layers of each: the fused layout is made from the tree in L^2 pieces, and 'auto' leaves it at 64."""
_DROPOUT_RATE = 0.2


def shape_of(num_layers: int) -> Shape:
    """D 256, W 16, C 10, batch 64."""
    return Shape(256, 16, num_layers, 10, 64)


def measure(depths: tuple[int, ...], rounds: int) -> dict[str, dict[int, dict[str, float]]]:
    """Per alternative and depth: compile_seconds (tracing, lowering and compiling, no cache) and run_ms, medians."""
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ALTERNATIVES}
    for depth in depths:
        case = Case(shape_of(depth))
        here = {name: how for name, how in ALTERNATIVES.items() if depth <= DEEPEST[how[0]]}
        compile_seconds: dict[str, list[float]] = {name: [] for name in here}
        run_seconds: dict[str, list[float]] = {name: [] for name in here}
        for _ in range(rounds):
            for name, (implementation, layout) in here.items():
                params = jax.jit(lambda tree, layout=layout: convert_params(tree, layout))(case.params)
                arguments = (params, case.features, jax.random.key(0))
                jax.clear_caches()
                start = time.perf_counter()
                compiled = jax.jit(case.gradient(implementation, _DROPOUT_RATE)).lower(*arguments).compile()
                compile_seconds[name].append(time.perf_counter() - start)
                run_seconds[name].append(_time(compiled, arguments))
        for name in here:
            results[name][depth] = {
                "compile_seconds": float(np.median(compile_seconds[name])),
                "run_ms": 1e3 * float(np.median(run_seconds[name])),
            }
    return results


def _time(compiled: Any, arguments: tuple[Any, ...], repetitions: int = 20) -> float:
    jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    for _ in range(repetitions):
        result = compiled(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repetitions


def report(workdir: Path, depths: tuple[int, ...], rounds: int, command: str) -> dict[str, Any]:
    """Measure, print a table and write results.json and results.png into `workdir`."""
    was_on = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        measured = measure(depths, rounds)
    finally:
        jax.config.update("jax_enable_compilation_cache", was_on)
    title, machine = "gradient of the head, D 256, W 16, C 10, batch 64, float32", device()
    results: dict[str, Any] = {
        "title": title,
        "command": command,
        "rounds": rounds,
        "alternatives": {
            name: {str(depth): values for depth, values in by_depth.items()} for name, by_depth in measured.items()
        },
        "device": machine,
        "versions": versions(),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "results.json", results)
    _plot(workdir / "results.png", measured, f"{title}\n{machine['kind']}")
    print(f"{title}; {machine['kind']}\n")
    print(format_table(measured))
    return results


def format_table(measured: dict[str, dict[int, dict[str, float]]]) -> str:
    """Compile seconds / run milliseconds by depth, as Markdown."""
    depths = list(next(iter(measured.values())))
    lines = [
        "| compile s / run ms | " + " | ".join(f"L {depth}" for depth in depths) + " | compile grows by |",
        "|" + "---|" * (len(depths) + 2),
    ]
    for name, by_depth in measured.items():
        cells = [
            f"{by_depth[depth]['compile_seconds']:.2f} / {by_depth[depth]['run_ms']:.2f}" if depth in by_depth else "-"
            for depth in depths
        ]
        last = max(by_depth)
        growth = by_depth[last]["compile_seconds"] / by_depth[depths[0]]["compile_seconds"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {growth:.2f} x to L {last} |")
    return "\n".join(lines)


def _plot(path: Path, measured: dict[str, dict[int, dict[str, float]]], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(axes, ("compile_seconds", "run_ms"), ("compile, s", "run, ms"), strict=True):
        for name, by_depth in measured.items():
            axis.plot(list(by_depth), [values[key] for values in by_depth.values()], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="layers L", ylabel=label)
        depths = list(next(iter(measured.values())))
        axis.set_xticks(depths, [str(depth) for depth in depths])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
