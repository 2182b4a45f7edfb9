"""Eight seeds on CPU: in a loop, side by side (a process a core), and by eager PyTorch, one after the other.

python results/seeds_side_by_side.py --data mnist.npz [--recipe mnist-paper] [--rounds 3]

The three take turns. Rates are of training alone (metrics.jsonl), whole runs are timed with everything: imports,
compilation or its cache, starting the processes, the test set. PyTorch trains one seed for as many epochs, as
`pspinal-jax benchmark step` does: data in memory, the same batch size, head and optimiser (Adam for adamw, and no
label smoothing), no evaluation.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from pspinal_jax.benchmark.steps import Data, Steps, benchmark_recipe, check_equal, torch_steps
from pspinal_jax.benchmark.timing import EAGER
from pspinal_jax.data import load_data
from pspinal_jax.environment import processor, versions
from pspinal_jax.recipes import load_recipe


def train(recipe: str, data: Path, seeds: int, epochs: int, mode: str) -> dict[str, object]:
    """A run in a process of its own: examples a second in training, seconds of the command, the result's checksum."""
    off = [] if load_recipe(recipe).protocol == "paper" else ["--data.num-validation", "0", "--no-retrain"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pspinal_jax", "train", recipe, "--data.path", str(data), *off]
        command += [
            "--epochs",
            str(epochs),
            "--num-seeds",
            str(seeds),
            "--seed-mode",
            mode,
            "--workdir",
            folder + "/run",
        ]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    seen = sum(line["examples_per_second"] * line["seconds"] for line in lines)
    rate = seen / sum(line["seconds"] for line in lines)
    return {"examples_per_second": rate, "seconds": seconds, "checksum": result["selected_checksum"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", default="mnist-paper")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    recipe = benchmark_recipe(given.recipe)
    train_split = load_data(dataclasses.replace(recipe.data, path=given.data)).train
    data = Data(np.asarray(train_split.inputs), train_split.labels, 10)
    if recipe.optimizer.name == "sgd":
        check_equal(recipe, data, [EAGER])
    eager = torch_steps(recipe, data, Steps.of_recipe(recipe, data).variables, [EAGER])[EAGER]
    steps = given.epochs * (len(data.labels) // recipe.batch_size)
    eager(20)
    runs: dict[str, list[dict[str, object]]] = {"loop": [], "processes": []}
    rates: dict[str, list[float]] = {"loop": [], "processes": [], "PyTorch eager": []}
    for _ in range(given.rounds):
        for mode, found in runs.items():
            found.append(train(given.recipe, given.data, given.seeds, given.epochs, mode))
            rates[mode].append(float(found[-1]["examples_per_second"]))
        start = time.perf_counter()
        eager(steps)
        rates["PyTorch eager"].append(steps * recipe.batch_size / (time.perf_counter() - start))
    print(f"{given.recipe}, batch {recipe.batch_size}, jax {jax.__version__}, {versions()['python']}, {processor()}")
    for name, found in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["processes"], found, strict=True)]
        print(f"{name:14} {statistics.median(found):8,.0f} examples/s; processes are faster by {spread(ratios)}")
    for mode, found in runs.items():
        print(f"{mode:14} whole runs: {spread([float(run['seconds']) for run in found])} s, {found[0]['checksum']}")


def spread(values: list[float]) -> str:
    """Median (least .. most)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


if __name__ == "__main__":
    main()
