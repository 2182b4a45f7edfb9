"""`benchmark compile`: how long `train` takes from the shell, with an empty and with a warm compilation cache."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pspinal_jax.benchmark.measurement import Case, Entry, Settings, table
from pspinal_jax.errors import RunError, printable


def cases(
    settings: Settings,
    train: Sequence[str] = ("digits",),
    published_data: Path | None = None,
    published_epochs: int = 50,
) -> list[Case]:
    """`train` from the shell.

    Args:
      settings: how much is measured.
      train: a recipe and flags, which lack their leading dashes.
      published_data: an .npz file on which PyTorch trains the published settings too.
      published_epochs: for so many epochs; the script has 50.
    """
    recipe, *flags = train
    words = [recipe, *(f"--{flag}" for flag in flags)]
    title = printable(f"seconds of `pspinal-jax train {' '.join(words)}`, process start to end")

    def case() -> list[Entry]:
        seconds = measure(words, settings.rounds)
        median = {name: float(np.median(values)) for name, values in seconds.items()}
        rows = [[name, median[name], ", ".join(f"{value:.1f}" for value in each)] for name, each in seconds.items()]
        bars = {"s": {f"{name} cache": values for name, values in seconds.items()}}
        columns = ["compilation cache", "median s", "each"]
        return [table(title, columns, rows, bars, {"title": title, "seconds": seconds, "median": median})]

    def published() -> list[Entry]:
        lines = measure_published(Path(str(published_data)), published_epochs)
        rows = [[line["epoch"], line["test"], line["seconds"]] for line in lines[-1:]]
        label = f"PyTorch, published settings,\n{rows[0][0]} epochs: {rows[0][1]:.2f} %"
        heading, columns = "the published settings in PyTorch", ["epochs", "test accuracy %", "s"]
        bars = {"s": {label: [rows[0][2]]}}
        return [table(heading, columns, rows, bars, {"published_settings_in_pytorch": lines})]

    return [("train", case)] + ([("published settings in PyTorch", published)] if published_data else [])


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
