"""`evaluate`: what a run's selected parameters do on the test split."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data import load_data
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import UsageError
from pspinal_jax.models.build import build_model
from pspinal_jax.runs.build import build_run_programs, input_of, place_split
from pspinal_jax.runs.directory import RunDirectory, write_json
from pspinal_jax.runs.metrics import plot_confusion
from pspinal_jax.runs.restore import load_recipe_of, load_variables
from pspinal_jax.training.chunk import Batch
from pspinal_jax.training.programs import Programs
from pspinal_jax.training.sharding import make_mesh


def evaluate(run: str | Path, seed_index: int | None = None, data_path: str | Path | None = None) -> dict[str, Any]:
    """Evaluate a run exactly, every test example once, and write evaluation.json and confusion.png into it.

    Args:
      run: run directory.
      seed_index: which of its seeds; by default the best on validation.
      data_path: a data set whose test split is taken in place of the run's own.

    Returns:
      accuracy 0 .. 1, correct, examples, loss (nats), class_accuracy by name (None for a class without examples) and
      confusion, rows the true class.

    Raises:
      PSpinalError: if the run or the data cannot be read or do not fit each other.
    """
    enable_compilation_cache()
    run = Path(run).expanduser()
    variables, config = load_variables(run, seed_index)
    recipe = dataclasses.replace(load_recipe_of(config), num_seeds=1)
    names = config["class_names"]
    source = recipe.data if data_path is None else dataclasses.replace(recipe.data, path=Path(data_path))
    data = load_data(dataclasses.replace(source, num_classes=len(names)))
    if data.class_names != tuple(names):
        raise UsageError(
            f"{data.source} has the classes {_shortened(data.class_names)}, but the run was trained on "
            f"{_shortened(names)}"
        )
    shape, dtype = input_of(recipe, data)
    if list(shape) != config["input_shape"] or str(dtype) != config["input_dtype"]:
        raise UsageError(
            f"{data.source} has inputs of shape {list(shape)} ({dtype}), but the run was trained on "
            f"{config['input_shape']} ({config['input_dtype']})"
        )
    programs = build_run_programs(recipe, build_model(recipe, shape, len(names)), shape, dtype, make_mesh())
    split = place_split(recipe, programs, data.test)
    sums = split.evaluate(partial(_evaluate, programs, programs.replicate(variables)))
    predictions = sums["predictions"][0]
    report = _report(predictions, data.test.labels, names) | {"loss": float(sums["loss"][0]) / split.count}
    directory = RunDirectory(run)
    write_json(directory.path / "evaluation.json", report)
    title = f"{recipe.card.name}: {100 * report['accuracy']:.2f} % of {split.count} test examples"
    plot_confusion(np.asarray(report["confusion"]), names, directory.path / "confusion.png", title)
    return report


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _evaluate(programs: Programs, variables: Any, data: Batch, count: int) -> dict[str, np.ndarray]:
    result = programs.evaluate(variables, data, np.int32(count))
    return {name: np.asarray(value)[None] for name, value in result._asdict().items()}


def _report(predictions: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (labels, predictions), 1)
    totals = confusion.sum(1)
    hits = np.diag(confusion)
    return {
        "accuracy": float(hits.sum() / len(labels)),
        "correct": int(hits.sum()),
        "examples": len(labels),
        "class_accuracy": {
            name: float(hits[index] / totals[index]) if totals[index] else None for index, name in enumerate(names)
        },
        "confusion": confusion.tolist(),
    }
