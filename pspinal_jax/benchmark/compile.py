"""`benchmark compile`: how long `train` takes from the shell, with an empty and with a warm compilation cache."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.benchmark.report import plot_bars, torch_version
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import RunError
from pspinal_jax.files import write_json


def measure(flags: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of `pspinal-jax train FLAGS`: cold (empty cache) and warm (the one that the cold run filled), in turn.

    Raises:
      RunError: if a run fails.
    """
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name in seconds:
                command = [sys.executable, "-m", "pspinal_jax", "train", *flags, "--workdir", f"{folder}/{name}"]
                environment = os.environ | {"PSPINAL_JAX_CACHE": f"{folder}/cache"}
                environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a cache of the user's would never be cold
                start = time.perf_counter()
                _run(command, environment)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_published(data: Path, epochs: int) -> list[dict[str, float]]:
    """The published settings of the MNIST row in PyTorch, see published.py: a line an epoch, seconds from the start.

    Raises:
      RunError: if it fails, as without torch.
    """
    start = time.time()
    command = [sys.executable, "-m", "pspinal_jax.benchmark.published", str(data), str(epochs), str(start)]
    return [json.loads(line) for line in _run(command, dict(os.environ)).splitlines()]


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RunError(f"{' '.join(command)} failed: {said}")
    return done.stdout


def report(
    workdir: Path, flags: list[str], rounds: int, command: str, published: tuple[Path, int] | None = None
) -> dict[str, Any]:
    """Measure, print and write results.json into `workdir`.

    Args:
      workdir: where to write.
      flags: recipe and flags of `train`.
      rounds: how often each cache is tried.
      command: what was typed.
      published: data file and number of epochs of the published settings in PyTorch, None to leave them out.
    """
    seconds = measure(flags, rounds)
    results: dict[str, Any] = {
        "title": f"seconds of `pspinal-jax train {' '.join(flags)}`, process start to end",
        "command": command,
        "seconds": seconds,
        "median": {name: float(np.median(values)) for name, values in seconds.items()},
        "device": device(),
        "versions": versions() | torch_version(),
    }
    if published is not None:
        results["published_settings_in_pytorch"] = measure_published(*published)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "results.json", results)
    rows = {f"{name} cache": values for name, values in seconds.items()}
    for line in results.get("published_settings_in_pytorch", [])[-1:]:
        rows[f"PyTorch, published settings,\n{line['epoch']} epochs: {line['test']:.2f} %"] = [line["seconds"]]
    plot_bars(workdir / "results.png", rows, "s", results["title"])
    print(f"{results['title']}; {device()['kind']}\n\n| compilation cache | median s | each |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {np.median(values):.1f} | {', '.join(f'{value:.1f}' for value in values)} |")
    for line in results.get("published_settings_in_pytorch", [])[-1:]:
        print(
            f"published settings in PyTorch: {line['seconds']:.0f} s, {line['epoch']} epochs, test {line['test']:.2f} %"
        )
    return results
