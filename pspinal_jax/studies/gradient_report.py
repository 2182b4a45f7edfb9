"""The gradient study, from its examples to results.json, results.png and the printed table."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.dataset import ArraySplit, make_dataset
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.prepare import read_digits
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import DataError, RunError
from pspinal_jax.files import expanded
from pspinal_jax.models.build import abstract_variables, count_parameters
from pspinal_jax.runs.directory import whole_file, write_json
from pspinal_jax.studies.gradient_study import (
    DENSE,
    MEASURED_EXAMPLES,
    NETWORKS,
    Examples,
    Study,
    follow,
    make_network,
)


def read_examples(path: Path | None, most: int, batch_size: int) -> tuple[Examples, str]:
    """At most `most` examples of each split, drawn with seed 0, and where they come from.

    Args:
      path: an .npz file, or None for scikit-learn's digits.
      most: at most so many training, and so many test examples.
      batch_size: of training; there must be that many training examples.

    Raises:
      DataError: if the file cannot be used, or holds fewer training examples than a batch.
    """
    if path is None:
        data = make_dataset(dict(read_digits()), "scikit-learn's digits", None)
    else:
        data = read_npz(expanded(path), None)
    (train, train_labels), (test, test_labels) = (_some(split, most) for split in (data.train, data.test))
    if len(train) < batch_size:
        raise DataError(
            f"{data.source}: {len(train)} training examples are less than a batch of {batch_size}; "
            "lower --batch-size or raise --max-examples"
        )
    return Examples(train, train_labels, test, test_labels, data.num_classes), data.source


def _some(split: ArraySplit, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, D], pixels scaled to 0 .. 1, and labels."""
    chosen = split.take(np.random.default_rng(0).permutation(len(split))[:most])
    scale = np.float32(255 if chosen.inputs.dtype == np.uint8 else 1)
    return chosen.inputs.reshape(len(chosen), -1).astype(np.float32) / scale, chosen.labels


HEADER = (
    "| network | L | parameters | at the features, start | end | layer 1 / layer L, start | end | test accuracy % |\n"
    "|---|---|---|---|---|---|---|---|"
)
_DIGITS = 4


def open_workdir(workdir: Path) -> None:
    """Make the directory; RunError if that, or writing into it, is not possible."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / "results.json.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"work directory {workdir} cannot be written: {error.strerror or error}") from error


def report(workdir: Path, study: Study, examples: Examples, source: str, command: str) -> dict[str, Any]:
    """Measure every network at every depth, print a row for each, and write results.json and results.png.

    Returns:
      What results.json holds.
    """
    print(HEADER, flush=True)
    dense = _measured("dense", 0, study, examples)
    networks: dict[str, Any] = {}
    for name in NETWORKS:
        networks[name] = {str(depth): _measured(name, depth, study, examples) for depth in study.depths}
    results = {
        "title": f"gradient norms on {source}, D {examples.train_features.shape[1]}, W {study.width}, "
        f"norm {study.norm or 'none'}, {study.num_seeds} seeds",
        "command": command,
        "study": dataclasses.asdict(study),
        "data": source,
        "train_examples": len(examples.train_labels),
        "test_examples": len(examples.test_labels),
        "measured_on": f"the first {min(MEASURED_EXAMPLES, len(examples.train_labels))} training examples",
        "described": NETWORKS | {"dense": DENSE},
        "dense": dense,
        "networks": networks,
        "device": device(),
        "versions": versions(),
    }
    write_json(workdir / "results.json", results)
    _plot(workdir / "results.png", results, study)
    return results


def _measured(name: str, depth: int, study: Study, examples: Examples) -> dict[str, Any]:
    head = make_network(name, depth, examples.num_classes, study)
    shapes = abstract_variables(head, examples.train_features.shape[1:])
    summary = summarise(follow(head, examples, study))
    summary = {"parameters": count_parameters(shapes["params"]), **summary}
    print(format_row(name, depth, summary), flush=True)
    return summary


def summarise(followed: dict[str, np.ndarray]) -> dict[str, Any]:
    """What `follow` returns, as JSON: each seed where it is one number, median and range where it is one per layer."""
    pre = followed["pre_activations"]
    with np.errstate(divide="ignore", invalid="ignore"):  # no gradient at all: no ratio
        ratio = pre[..., 0] / pre[..., -1] if pre.shape[-1] else None
    return {
        "epochs": followed["epochs"].tolist(),
        "features": _rounded(followed["features"]),
        "first_to_last_layer": None if ratio is None else _rounded(ratio),
        "loss": _rounded(followed["loss"]),
        "test_accuracy": _rounded(followed["test_accuracy"]),
        "pre_activations": {
            "median": _rounded(np.median(pre, axis=1)),
            "low": _rounded(pre.min(axis=1)),
            "high": _rounded(pre.max(axis=1)),
        },
        "kernels": {"median": _rounded(np.median(followed["kernels"], axis=1))},
    }


def _rounded(values: np.ndarray) -> Any:
    """Nested lists with four significant digits, and None for what is not finite."""
    if values.ndim:
        return [_rounded(value) for value in values]
    number = float(values)
    return float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else None


def format_row(name: str, depth: int, summary: dict[str, Any]) -> str:
    """A row of the table: medians over seeds, with the range."""
    features, ratio = summary["features"], summary["first_to_last_layer"]
    accuracy = [None if value is None else 100 * value for value in summary["test_accuracy"][-1]]
    cells = [
        name,
        str(depth) if depth else "-",
        f"{summary['parameters']:,}",
        _spread(features[0]),
        _spread(features[-1]),
        "-" if ratio is None else _spread(ratio[0], otherwise="no ratio"),
        "-" if ratio is None else _spread(ratio[-1], otherwise="no ratio"),
        _spread(accuracy, ".1f"),
    ]
    return "| " + " | ".join(cells) + " |"


def _spread(values: list[float | None], digits: str = ".2g", otherwise: str = "not finite") -> str:
    if any(value is None for value in values):
        return otherwise
    numbers = np.array(values, float)
    return f"{np.median(numbers):{digits}} ({numbers.min():{digits}} .. {numbers.max():{digits}})"


def _plot(path: Path, results: dict[str, Any], study: Study) -> None:
    """Top: at the features, by depth. Bottom: at each layer of the deepest. Left: at the start. Right: at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    deepest = study.depths[-1]
    for column, (index, epoch) in enumerate(((0, 0), (-1, study.epochs))):
        top, bottom = axes[:, column]
        for name, by_depth in results["networks"].items():
            values = np.array([by_depth[str(depth)]["features"][index] for depth in study.depths], float)
            _line(top, study.depths, (np.median(values, 1), values.min(1), values.max(1)), name)
            layers = by_depth[str(deepest)]["pre_activations"]
            low_to_high = tuple(np.array(layers[key][index], float) for key in ("median", "low", "high"))
            _line(bottom, range(1, deepest + 1), low_to_high, name)
        dense = np.median(np.array(results["dense"]["features"][index], float))
        top.axhline(dense, color="grey", linestyle=":", label="dense")
        top.set(title=f"at the features, epoch {epoch}", xlabel="hidden layers", xscale="log")
        top.set_xticks(study.depths, [str(depth) for depth in study.depths])
        top.minorticks_off()
        bottom.set(title=f"at each layer of {deepest}, epoch {epoch}", xlabel="layer")
    for axis in axes.flat:
        axis.set_yscale("log", nonpositive="mask")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("gradient norm per example")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{results['title']} (median and range)", fontsize=10)
    with whole_file(path) as part:
        figure.savefig(part, dpi=110, format="png")


def _line(axis: Any, x: Sequence[int], low_to_high: tuple[np.ndarray, ...], name: str) -> None:
    """The median over seeds as a line, in a band from the lowest to the highest."""
    median, low, high = low_to_high
    (line,) = axis.plot(x, median, marker=".", label=name)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
