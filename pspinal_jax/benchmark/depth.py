"""`benchmark depth`: compile time and run time of the head's gradient as the number of layers grows."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from pspinal_jax.benchmark.head import HeadGradient, Shape
from pspinal_jax.benchmark.measurement import Case, Entry, Settings, table
from pspinal_jax.heads.layouts import Computed, Layout, convert_params

TITLE = "gradient of the head, D 256, W 16, C 10, batch 64, float32"
ALTERNATIVES: dict[str, tuple[Computed, Layout]] = {
    "unrolled": ("unrolled", "tree"),
    "fused, fused parameters": ("fused", "fused"),
    "scan, documented tree": ("scan", "tree"),
    "scan, packed parameters": ("scan", "packed"),
}
DEEPEST = {"unrolled": 256, "fused": 64, "scan": 1024}
"""The most layers of each: the fused layout is made from the tree in L^2 pieces, and 'auto' leaves it at 64."""
_DROPOUT_RATE = 0.2


def cases(settings: Settings, depths: Sequence[int] = ()) -> list[Case]:
    """The head's gradient by number of layers."""
    rounds = 1 if settings.quick else settings.rounds
    return [(f"{depth} layers", partial(_case, depth, rounds)) for depth in depths or settings.depths]


def _case(depth: int, rounds: int) -> list[Entry]:
    measured = measure(depth, rounds)
    rows = [[name, depth, values["compile_seconds"], values["run_ms"]] for name, values in measured.items()]
    bars = {
        unit: {f"{name}, L {depth}": [values[kind]] for name, values in measured.items()}
        for unit, kind in (("s to compile", "compile_seconds"), ("ms a call", "run_ms"))
    }
    alternatives = {name: {str(depth): values} for name, values in measured.items()}
    fields = {"title": TITLE, "rounds": rounds, "alternatives": alternatives}
    return [table(TITLE, ["", "layers", "compile s", "ms a call"], rows, bars, fields)]


def measure(depth: int, rounds: int) -> dict[str, dict[str, float]]:
    """Per alternative: compile_seconds (tracing, lowering and compiling, no cache) and run_ms, medians."""
    head = HeadGradient(Shape(256, 16, depth, 10, 64))
    here = {name: how for name, how in ALTERNATIVES.items() if depth <= DEEPEST[how[0]]}
    compile_seconds: dict[str, list[float]] = {name: [] for name in here}
    run_seconds: dict[str, list[float]] = {name: [] for name in here}
    cache = "jax_enable_compilation_cache"
    was_on = jax.config.values[cache]
    jax.config.update(cache, False)
    try:
        for _ in range(rounds):
            for name, (implementation, layout) in here.items():
                params = jax.jit(lambda tree, layout=layout: convert_params(tree, layout))(head.params)
                arguments = (params, head.features, jax.random.key(0))
                jax.clear_caches()
                start = time.perf_counter()
                compiled = jax.jit(head.gradient(implementation, _DROPOUT_RATE)).lower(*arguments).compile()
                compile_seconds[name].append(time.perf_counter() - start)
                run_seconds[name].append(_time(compiled, arguments))
    finally:
        jax.config.update(cache, was_on)
    return {
        name: {
            "compile_seconds": float(np.median(compile_seconds[name])),
            "run_ms": 1e3 * float(np.median(run_seconds[name])),
        }
        for name in here
    }


def _time(compiled: Any, arguments: tuple[Any, ...], repetitions: int = 20) -> float:
    jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    for _ in range(repetitions):
        result = compiled(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repetitions
