"""Runs described for people: lines on the terminal, and an HTML page that holds its pictures and runs no script.

The names of classes, files, settings and versions on the page are text from strangers. The template report.html escapes
every value that it is given, and its Content-Security-Policy lets a browser load nothing and run nothing.
"""

import base64
import dataclasses
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from markupsafe import Markup
from PIL import Image

from pspinal_jax.data.dataset import Dataset, Split
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import PSpinalError, printable
from pspinal_jax.files import check_target, expanded
from pspinal_jax.models import Classifier, abstract_variables, count_parameters
from pspinal_jax.recipes.registry import describe_head_training
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.build import split_examples
from pspinal_jax.runs.directory import RunDirectory, whole_file
from pspinal_jax.runs.evaluate import Evaluated, Mistake, evaluate_examples
from pspinal_jax.runs.metrics import MAX_NUMBERED_CLASSES, plot_confusion, plot_curves
from pspinal_jax.runs.scores import percent, without_examples, worst_first
from pspinal_jax.training.stages import TrainingStage
from pspinal_jax.training.state import trainable

MAX_ROWS = 20  # of a table of classes
_MAX_LISTED_CLASSES = 12
_MAX_WORST_CLASSES = 6
_NAMED = 3
_SMALL_PICTURE = 64
_SCORES = {
    "accuracy": "test accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top_5_accuracy": "top-5 accuracy",
    "loss": "negative log-likelihood, nats",
    "calibration_error": "calibration error",
}


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, whose first column is aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([f"  {first.ljust(widths[0])}", *map(str.rjust, others, widths[1:])]).rstrip()
        for first, *others in rows
    ]


def describe_start(
    recipe: Recipe, init_from: Path | None, data: Dataset[Split], model: Classifier, stages: list[TrainingStage]
) -> list[str]:
    """The lines about a training before it starts: its data by class, its model, its devices, its steps.

    Args:
      recipe: the recipe.
      init_from: the run whose parameters it starts from, or None.
      data: with its validation split, where one was drawn by class.
      model: the recipe's, backbone included.
      stages: what the run does.
    """
    name = "" if recipe.card.name == "none" else f"{recipe.card.name}: "
    counts = class_counts(recipe, data)
    sizes = ", ".join(f"{split} {of_class.sum():,}" for split, of_class in counts.items())
    lines = [f"{name}{data.source}, {data.num_classes} classes; examples: {sizes}"]
    names = [printable(name) for name in data.class_names]
    if len(names) <= _MAX_LISTED_CLASSES:
        rows = [[name, *(f"{split[index]:,}" for split in counts.values())] for index, name in enumerate(names)]
        lines += text_table([["class", *counts], *rows])
    else:
        train = counts["train"]
        *smallest, largest = [f"{names[i]} {train[i]:,}" for i in np.argsort(train, kind="stable")[[0, 1, 2, -1]]]
        lines.append(f"  in train {', '.join(smallest)} .. {largest} examples a class, median {np.median(train):,.0f}")
    lines.append(f"input {' x '.join(map(str, data.example_shape))} {data.example_dtype}; {_model(recipe, init_from)}")
    params = abstract_variables(model, data.example_shape, data.example_dtype)["params"]
    frozen = ("backbone",) if recipe.freeze == "backbone" else ()
    trained = f"{count_parameters(trainable(params, frozen)):,} of them" if frozen else "all of them"
    lines.append(
        f"{count_parameters(params):,} parameters, {trained} trained{': the backbone is frozen' * bool(frozen)}"
    )
    devices, stage = device(), stages[0]
    several = f", {devices['count']} devices" if devices["count"] > 1 else ""
    of = f" of {recipe.num_seeds} seeds" if recipe.num_seeds > 1 else ""
    lines.append(
        f"{devices['platform']} ({devices['kind']}){several}; {recipe.epochs} epochs of {stage.steps_per_epoch:,} "
        f"steps of {recipe.batch_size} examples{of}"
        + (f"; {' then '.join(stage.name for stage in stages)}" if len(stages) > 1 else "")
    )
    if recipe.cache_features:
        lines.append(describe_head_training(recipe))
    return lines


def class_counts(recipe: Recipe, data: Dataset[Split]) -> dict[str, np.ndarray]:
    """Examples of each class [C] in train, validation (where examples are held out) and test."""
    train, validation = split_examples(recipe, data)
    labels = data.train.labels
    if data.validation is not None:
        labels = np.concatenate([labels, data.validation.labels])
    splits = {"train": labels[train], "validation": labels[validation], "test": data.test.labels}
    return {
        name: np.bincount(of_split, minlength=data.num_classes) for name, of_split in splits.items() if len(of_split)
    }


def _model(recipe: Recipe, init_from: Path | None) -> str:
    model = recipe.model
    layers = "" if model.head in ("dense", "mlp") else f" ({model.num_layers} layers of {model.layer_width})"
    head = f"{model.head} head{layers}"
    if model.backbone == "none":
        return head if init_from is None else f"{head}, from {init_from}"
    weights = f"from {init_from}" if init_from is not None else f"weights {model.weights or 'random'}"
    return f"backbone {model.backbone}, {weights}; {head}"


def describe_result(result: dict[str, Any]) -> str:
    """The lines about a finished run."""
    lines = [f"test accuracy {_of_seeds(result['test_accuracy'])}  ({result['selection']})"]
    if "best_on_test_accuracy" in result:
        best = _of_seeds(result["best_on_test_accuracy"])
        lines.append(f"best on test  {best}  (selected on the test split: not an estimate of accuracy on new data)")
    classes = [
        (float(np.mean(each["recall"])), each["support"], each["name"])
        for each in result.get("test_classes", [])
        if each["support"] and None not in each["recall"]
    ]
    if len(classes) > 1 and "test_balanced_accuracy" in result:  # older runs have neither
        balanced = f"{_of_seeds(result['test_balanced_accuracy'])}{without_examples(result['test_classes'])}"
        lines.append(f"balanced accuracy {balanced}; classes recognised, worst first:")
        classes.sort(key=lambda each: each[0])
        lines += text_table(
            [(printable(name), percent(recall), f"of {many:,}") for recall, many, name in classes[:_MAX_WORST_CLASSES]]
        )
        if rest := classes[_MAX_WORST_CLASSES:]:
            lines.append(f"  and {len(rest)} more classes, each {percent(rest[0][0])} or more")
    if result["published_accuracy_percent"] is not None:
        lines.append(f"the paper reports {result['published_accuracy_percent']} % for this row")
    return "\n".join(lines)


def _of_seeds(values: dict[str, Any]) -> str:
    mean = percent(values["mean"])
    return mean if values["std"] is None else f"{mean} ± {100 * values['std']:.2f} (std of {len(values['each'])} seeds)"


def describe_scores(report: dict[str, Any]) -> list[str]:
    """The lines about a `score_report`: scores, classes worst first, confusions."""
    low, high = report["intervals"]["accuracy"]
    lines = [
        f"test accuracy {percent(report['accuracy'])} ({report['correct']} of {report['examples']}; "
        f"95 % interval {100 * low:.2f} to {100 * high:.2f})",
        f"balanced accuracy {percent(report['balanced_accuracy'])}{without_examples(report['classes'])}, "
        f"macro F1 {percent(report['macro_f1'])}",
    ]
    if "top_5_accuracy" in report:
        lines[1] += f", top-5 accuracy {percent(report['top_5_accuracy'])}"
    lines.append(
        f"negative log-likelihood {report['loss']:.4f} nats, calibration error {percent(report['calibration_error'])} "
        f"({report['calibration_bins']} bins)"
    )
    rows = [["class, worst first", "examples", "precision", "recall", "F1"]]
    for each in worst_first(report["classes"])[:MAX_ROWS]:
        scores = [percent(each[name]) for name in ("precision", "recall", "f1")]
        rows.append([printable(each["name"]), str(each["support"]), *scores])
    lines += text_table(rows)
    if len(report["classes"]) > MAX_ROWS:
        lines.append(f"  and {len(report['classes']) - MAX_ROWS} more classes")
    if report["most_confused"]:
        named = [
            f"{printable(each['true'])} taken for {printable(each['predicted'])} {each['count']} times"
            for each in report["most_confused"][:_NAMED]
        ]
        lines.append(f"most often: {'; '.join(named)}")
    return lines


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run for the template: `evaluated` is None where that was not possible, and `problem` says why."""

    path: Path
    config: dict[str, Any]
    result: dict[str, Any] | None
    evaluated: Evaluated | None
    problem: str
    curves: str
    confusion: str

    @property
    def name(self) -> str:
        return f"{self.config['identity']['card']['name']} in {self.path}"

    @property
    def report(self) -> dict[str, Any] | None:
        return None if self.evaluated is None else self.evaluated.report

    @property
    def classes(self) -> list[dict[str, Any]]:
        return [] if self.report is None else worst_first(self.report["classes"])

    @property
    def confusions(self) -> list[tuple[str, list[int]]]:
        """The rows of the confusion matrix by their classes' names; none where a picture shows them."""
        if self.evaluated is None or len(self.evaluated.class_names) > MAX_NUMBERED_CLASSES:
            return []
        names = self.evaluated.class_names
        return list(zip(names, self.evaluated.scored.confusion(len(names)).toarray().tolist(), strict=True))

    @property
    def mistakes(self) -> list[tuple[Mistake, str, bool]]:
        """The surest mistakes, each with its picture as a URL and whether that is small."""
        return [] if self.evaluated is None else [_with_picture(each) for each in self.evaluated.mistakes()]

    @property
    def settings(self) -> dict[str, Any]:
        return flatten_dict(self.config["identity"] | {"num_seeds": self.config["num_seeds"]}, sep=".")

    def score(self, key: str) -> tuple[str, str]:
        """A score and its interval, which not all have."""
        report = self.report or {}
        if key not in report:
            return "-", ""
        ends = report["intervals"].get(key)
        value = f"{report[key]:.4f}" if key == "loss" else percent(report[key])
        return value, f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}" if ends else ""

    @property
    def seeds(self) -> str:
        several = self.result is not None and self.result["test_accuracy"]["std"] is not None
        return _of_seeds(self.result["test_accuracy"]) if self.result is not None and several else "-"


def write_report(runs: Sequence[str | Path], output: str | Path, show_progress: bool = False) -> list[str]:
    """Evaluate `runs` on their own data and write the page `output` about them, side by side; nothing else is written.

    Args:
      runs: run directories, finished or not.
      output: the .html file to write.
      show_progress: whether to show a bar on standard error for evaluations that take long.

    Returns:
      What could not be shown, a line each: a run whose data is gone is not evaluated.

    Raises:
      PSpinalError: if a run's config.json or result.json cannot be read, or the page cannot be written.
    """
    output = expanded(output)
    check_target(output, "--output")
    read = [_read(expanded(run), show_progress) for run in runs]
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # a machine that only trains can lack it

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        # On one line and without control characters; Markup comes from the template itself.
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    environment.filters |= {"percent": percent, "without_examples": without_examples}
    page = environment.get_template("report.html").render(
        title=read[0].name if len(read) == 1 else f"{len(read)} runs",
        version=versions()["pspinal_jax"],
        runs=read,
        labels=_SCORES,
        max_rows=MAX_ROWS,
        **_side_by_side(read),
    )
    with whole_file(output) as part:
        part.write_text(page, encoding="utf-8")
    return [f"{run.path}: {run.problem}" for run in read if run.problem]


def _read(path: Path, show_progress: bool) -> _Run:
    directory = RunDirectory(path)
    config, result, lines = directory.config(), directory.result(), directory.metrics()
    evaluated, problem = None, ""
    try:
        evaluated = evaluate_examples(path, show_progress=show_progress)
    except PSpinalError as error:
        problem = f"not evaluated: {error}"
    with tempfile.TemporaryDirectory() as folder:
        curves, confusion = Path(folder) / "curves.svg", Path(folder) / "confusion.svg"
        if lines:
            plot_curves(lines, curves, "")
        names = config["class_names"]
        if evaluated is not None and len(names) > MAX_NUMBERED_CLASSES:
            plot_confusion(evaluated.scored.confusion(len(names)), names, confusion, "")
        # A drawing that failed has been warned of.
        urls = [_url(path.read_bytes(), "svg+xml") if path.exists() else "" for path in (curves, confusion)]
    return _Run(path, config, result, evaluated, problem, *urls)


def _url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _with_picture(mistake: Mistake) -> tuple[Mistake, str, bool]:
    small = mistake.picture.shape[0] < _SMALL_PICTURE
    content, kind = io.BytesIO(), "png" if small else "jpeg"
    Image.fromarray(np.squeeze(mistake.picture, 2) if mistake.picture.shape[2] == 1 else mistake.picture).save(
        content, kind, quality=85
    )
    return mistake, _url(content.getvalue(), kind), small


def _side_by_side(runs: list[_Run]) -> dict[str, Any]:
    """What the template compares: the settings that differ, and recall by class where all have the same."""
    settings = [run.settings for run in runs]
    rows = [(name, [each.get(name, "-") for each in settings]) for name in sorted(set().union(*settings))]
    recalls = [run.report["class_accuracy"] for run in runs if run.report is not None]
    order: list[str] = []
    if len(recalls) == len(runs) and len({tuple(each) for each in recalls}) == 1:
        order = sorted(recalls[0], key=lambda name: min(1 if each[name] is None else each[name] for each in recalls))
    return {
        "differing": [(name, values) for name, values in rows if len({str(value) for value in values}) > 1],
        "recalls": [(name, [each[name] for each in recalls]) for name in order[:MAX_ROWS]],
    }
