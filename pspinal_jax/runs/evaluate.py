"""`evaluate`: what a run's selected parameters do on the test split."""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data import Dataset, load_data
from pspinal_jax.data.dataset import Split
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import DataError, RunError, UsageError, printable
from pspinal_jax.files import expanded
from pspinal_jax.models.build import build_model
from pspinal_jax.progress import warn
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.build import place_split
from pspinal_jax.runs.directory import read_json, write_json
from pspinal_jax.runs.metrics import plot_confusion
from pspinal_jax.runs.programs import build_run_programs
from pspinal_jax.runs.restore import load_recipe_of, load_variables
from pspinal_jax.training.chunk import Batch
from pspinal_jax.training.programs import Programs
from pspinal_jax.training.sharding import make_mesh


def evaluate(run: str | Path, seed_index: int | None = None, data_path: str | Path | None = None) -> dict[str, Any]:
    """Evaluate a run exactly, every test example once, and write evaluation.json and confusion.png into it.

    Of other data than the run was trained on they are evaluation-CHECKSUM.json and confusion-CHECKSUM.png, with the
    data's checksum, and evaluation.json lists them as other_data. Where they cannot be written, a warning says so.

    Args:
      run: run directory.
      seed_index: which of its seeds; by default the best on validation.
      data_path: a data set whose test split is taken in place of the run's own.

    Returns:
      accuracy 0 .. 1, correct, examples, loss (nats), class_accuracy by name (None for a class without examples),
      confusion, rows the true class, data, where it came from, data_fingerprint, its checksum, and trained_on_it,
      whether this is the data that the run was trained on; and files, the names of what was written.

    Raises:
      PSpinalError: if the run or the data cannot be read or do not fit each other, the run's own data is no longer what
        it was trained on, or its logits are not finite.
    """
    enable_compilation_cache()
    run = expanded(run)
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
    shape, dtype = data.example_shape, data.example_dtype
    if list(shape) != config["input_shape"] or str(dtype) != config["input_dtype"]:
        raise UsageError(
            f"{data.source} has inputs of shape {list(shape)} ({dtype}), but the run was trained on "
            f"{config['input_shape']} ({config['input_dtype']})"
        )
    fingerprint = _fingerprint(recipe, data)
    same = fingerprint == config["identity"]["data_fingerprint"]
    if data_path is None and not same:
        raise DataError(
            f"{data.source} is no longer what the run was trained on: it has changed since, and so may have its split "
            "into training and test examples; name the data to evaluate on with --data.path"
        )
    programs = build_run_programs(recipe, build_model(recipe, shape, len(names)), shape, dtype, make_mesh())
    split = place_split(recipe, programs, data.test)
    sums = split.evaluate(partial(_evaluate, programs, programs.replicate(variables)))
    predictions = sums["predictions"][0]
    loss = float(sums["loss"][0]) / split.count
    if not np.isfinite(loss):
        raise RunError(f"{run} gives logits that are not finite: training diverged; its accuracy would mean nothing")
    report = _report(predictions, data.test.labels, names) | {"loss": loss}
    report |= {"data": data.source, "data_fingerprint": fingerprint, "trained_on_it": same}
    return report | {"files": _write(run, report, names, recipe.card.name)}


def _write(run: Path, report: dict[str, Any], names: list[str], recipe_name: str) -> list[str]:
    """Write `report` and return the names of the files, which are others for other data than the run's own."""
    ending = "" if report["trained_on_it"] else f"-{report['data_fingerprint']}"
    numbers, plot = run / f"evaluation{ending}.json", run / f"confusion{ending}.png"
    title = f"{recipe_name}: {100 * report['accuracy']:.2f} % of {report['examples']} test examples"
    try:
        write_json(numbers, report)
        plot_confusion(np.asarray(report["confusion"]), names, plot, title)
    except RunError as error:
        warn(printable(error))
        return []
    _list_others(run)
    return [path.name for path in (numbers, plot) if path.exists()]


def _list_others(run: Path) -> None:
    """Name the evaluations of other data in evaluation.json, where it is there; damaged files are passed over."""
    others = {}
    for path in sorted(run.glob("evaluation-*.json")):
        with contextlib.suppress(RunError, LookupError, TypeError):
            others[path.name] = read_json(path)["data"]
    with contextlib.suppress(RunError, TypeError):
        if others:
            write_json(run / "evaluation.json", read_json(run / "evaluation.json") | {"other_data": others})


def _fingerprint(recipe: Recipe, data: Dataset[Split]) -> str:
    """The checksum of `data` as config.json records it."""
    if not data.in_memory and recipe.protocol == "validation":
        data = data.with_validation(recipe.data.validation_fraction, recipe.data.split_seed)
    return data.fingerprint()


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
