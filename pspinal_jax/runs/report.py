"""Descriptions of runs: lines on the terminal, and a self-contained HTML page without scripts.

The names of classes, files, settings and versions on the page may come from strangers. The template report.html escapes
every value, and its Content-Security-Policy prevents the browser from loading or running anything.
"""

import base64
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
from pspinal_jax.runs.evaluate import PICTURE_SIZE, evaluate_examples
from pspinal_jax.runs.scores import (
    MAX_NUMBERED_CLASSES,
    percent,
    plot_confusion,
    plot_curves,
    without_examples,
    worst_first,
)
from pspinal_jax.runs.start import FEATURES
from pspinal_jax.runs.suspects import find_suspects
from pspinal_jax.training.costs import describe_costs, total_costs
from pspinal_jax.training.stages import TrainingStage
from pspinal_jax.training.state import trainable

MAX_ROWS = 20  # of a table of classes
_MAX_LISTED_CLASSES = 12
_MAX_WORST_CLASSES = 6
_NAMED = 3
_SMALL_PICTURE = 64
_MAX_PICTURES = 24
_SCORES = {
    "accuracy": "test accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top_5_accuracy": "top-5 accuracy",
    "loss": "negative log-likelihood, nats",
    "calibration_error": "calibration error",
}


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table with a left-aligned first column and right-aligned others."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([f"  {first.ljust(widths[0])}", *map(str.rjust, others, widths[1:])]).rstrip()
        for first, *others in rows
    ]


def describe_start(
    recipe: Recipe, init_from: Path | None, data: Dataset[Split], model: Classifier, stages: list[TrainingStage]
) -> list[str]:
    """The summary before a training: data by class, model, devices and steps.

    Args:
      recipe: the recipe.
      init_from: the run whose parameters it starts from, or None.
      data: the data set, with its validation split if one was drawn by class.
      model: the recipe's model, including the backbone.
      stages: the stages of the run.
    """
    counts = class_counts(recipe, data)
    sizes = ", ".join(f"{split} {of_class.sum():,}" for split, of_class in counts.items())
    lines = [f"{recipe.card.name}: {data.source}, {data.num_classes} classes; examples: {sizes}"]
    if data.num_classes <= _MAX_LISTED_CLASSES:
        rows = zip(data.class_names, *counts.values(), strict=True)
        lines += text_table([("class", *counts), *((printable(name), *map("{:,}".format, row)) for name, *row in rows)])
    else:
        train = counts["train"]
        lines.append(f"  in train {train.min():,} to {train.max():,} examples a class, median {np.median(train):,.0f}")
    lines.append(f"input {' x '.join(map(str, data.example_shape))} {data.example_dtype}; {_model(recipe, init_from)}")
    params = abstract_variables(model, data.example_shape, data.example_dtype)["params"]
    frozen = ("backbone",) if recipe.freeze == "backbone" else ()
    trained = f"{count_parameters(trainable(params, frozen)):,}, as the backbone is frozen" if frozen else "all"
    lines.append(f"{count_parameters(params):,} parameters; trained: {trained}")
    devices, steps = device(), stages[0].steps_per_epoch
    lines.append(
        f"{devices['platform']} ({devices['kind']}), devices: {devices['count']}; seeds: {recipe.num_seeds}; "
        f"{' then '.join(stage.name for stage in stages)}: {recipe.epochs} epochs of "
        f"{steps:,} step{'s' * (steps != 1)} of {recipe.batch_size} examples"
    )
    return [*lines, describe_head_training(recipe)] if recipe.cache_features else lines


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
    backbone = f"backbone {model.backbone}; " if model.backbone != "none" else ""
    weights = f"weights {model.weights or 'random'}" if init_from is None else f"from {init_from}"
    return f"{backbone}{model.head} head{layers}; {weights}"


def describe_result(result: dict[str, Any]) -> str:
    """The lines about a finished run."""
    lines = [f"test accuracy {_of_seeds(result['test_accuracy'])}  ({result['selection']})"]
    if "best_on_test_accuracy" in result:
        best = _of_seeds(result["best_on_test_accuracy"])
        lines.append(f"best on test  {best}  (selected on the test split: not an estimate of accuracy on new data)")
    if "test_balanced_accuracy" in result and "test_classes" in result:  # older runs have neither
        balanced = f"{_of_seeds(result['test_balanced_accuracy'])}{without_examples(result['test_classes'])}"
        lines.append(f"balanced accuracy {balanced}; recall by class, worst first:")
        classes = [each for each in result["test_classes"] if each["support"]]
        recall = {each["name"]: float(np.mean([value or 0.0 for value in each["recall"]])) for each in classes}
        classes.sort(key=lambda each: recall[each["name"]])
        lines += text_table(
            [
                (printable(each["name"]), percent(recall[each["name"]]), f"of {each['support']:,}")
                for each in classes[:_MAX_WORST_CLASSES]
            ]
        )
        if len(classes) > _MAX_WORST_CLASSES:
            lines.append(f"  and {len(classes) - _MAX_WORST_CLASSES} more classes")
    if (calibration := result.get("calibration")) is not None:
        lines += _calibration(calibration)
    if result["published_accuracy_percent"] is not None:
        lines.append(f"the paper reports {result['published_accuracy_percent']} % for this row")
    return "\n".join(lines)


def _calibration(found: dict[str, Any]) -> list[str]:
    """The line about the entry `calibration` of result.json."""
    if found["reason"]:
        return [f"no temperature, and predict never answers unknown: {found['reason']}"]
    before, after = (percent(float(np.mean(found["calibration_error"][when]))) for when in ("before", "after"))
    return [
        f"temperature {np.mean(found['temperature']):.3f}: calibration error {before} before and {after} after, on "
        f"{found['examples']:,} held-out examples; predict answers unknown below a score of "
        f"{np.mean(found['threshold']):.3f} ({1 - found['accept']:.0%} of these)"
    ]


def _of_seeds(values: dict[str, Any]) -> str:
    mean = percent(values["mean"])
    return mean if values["std"] is None else f"{mean} ± {100 * values['std']:.2f} (std of {len(values['each'])} seeds)"


def describe_scores(report: dict[str, Any]) -> list[str]:
    """The lines about a `score_report`: scores, classes with the worst first, confusions."""
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
    if "temperature" in report:
        before = percent(report["untempered"]["calibration_error"])
        lines[-1] += f"; at temperature {report['temperature']:.3f} ({before} without)"
    if "rejection" in report:
        passed = ", ".join(
            f"{percent(each['accuracy'])} of {100 * each['accepted']:.1f} % (accept {each['accept']:g})"
            for each in report["rejection"][:_NAMED]
        )
        lines.append(f"accuracy on accepted examples: {passed}")
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
        lines.append(f"most frequent confusions: {'; '.join(named)}")
    return lines


def write_report(runs: Sequence[str | Path], output: str | Path, show_progress: bool = False) -> list[str]:
    """Evaluate `runs` on their own data, and write one page about them, side by side. Nothing else is written.

    Args:
      runs: run directories, finished or not.
      output: the .html file to write.
      show_progress: whether to show a progress bar on standard error if evaluation takes long.

    Returns:
      One line for each thing that could not be shown; a run whose data is gone is not evaluated.

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
        title=read[0]["name"] if len(read) == 1 else f"{len(read)} runs",
        version=versions()["pspinal_jax"],
        runs=read,
        labels=_SCORES,
        max_rows=MAX_ROWS,
        **_side_by_side(read),
    )
    with whole_file(output) as part:
        part.write_text(page, encoding="utf-8")
    return [f"{run['path']}: {run['problem']}" for run in read if run["problem"]]


def _read(path: Path, show_progress: bool) -> dict[str, Any]:
    """What the template shows of the run in `path`; a run that cannot be evaluated has a problem and no report."""
    directory = RunDirectory(path)
    config, result, lines = directory.config(), directory.result(), directory.metrics()
    identity, seeds = config["identity"], None if result is None else result["test_accuracy"]
    run: dict[str, Any] = {
        "path": path,
        "name": f"{identity['card']['name']} in {path}",
        "config": config,
        "result": result,
        "settings": flatten_dict(identity | {"num_seeds": config["num_seeds"]}, sep="."),
        "seeds": "-" if seeds is None or seeds["std"] is None else _of_seeds(seeds),
        "problem": "",
        "report": None,
        "near": [],
        "suspects": [],
        "costs": describe_costs(total_costs(lines)),
    }
    with tempfile.TemporaryDirectory() as folder:
        curves, confusion = Path(folder) / "curves.svg", Path(folder) / "confusion.svg"
        if lines:
            plot_curves(lines, curves, "")
        try:
            evaluated = evaluate_examples(path, show_progress=show_progress)
            names, report = evaluated.predictor.class_names, evaluated.report
            matrix = evaluated.scored.confusion(len(names))
            if len(names) > MAX_NUMBERED_CLASSES:
                plot_confusion(matrix, names, confusion, "")
            else:
                run["matrix"] = list(zip(names, matrix.toarray().tolist(), strict=True))
            mistakes = [(each, _picture(each.picture)) for each in evaluated.mistakes()]
            run |= {"report": report, "classes": worst_first(report["classes"]), "mistakes": mistakes}
            run["near"], run["near_count"] = _near_pairs(evaluated.data)
            if FEATURES in directory.recorded():
                suspects = find_suspects(path).pictures(_MAX_PICTURES)
                run["suspects"] = [(*each, _picture(pixels)) for *each, pixels in suspects]
        except PSpinalError as error:
            run["problem"] = f"not evaluated: {error}"
        # A drawing that failed has been warned of.
        for name, file in (("curves", curves), ("confusion", confusion)):
            run[name] = _url(file.read_bytes(), "svg+xml") if file.exists() else ""
    return run


def _near_pairs(data: Dataset[Split]) -> tuple[list[list[tuple[str, str]]], int]:
    """(name, picture) of both images of some near pairs, those across a split first; and how many there are."""
    contents, found = data.contents(), []
    pairs = contents.near_pairs().tolist()
    pairs.sort(key=lambda pair: data.place(pair[0])[0] == data.place(pair[1])[0])
    for pair in pairs[: _MAX_PICTURES // 2]:
        places = [(index, *data.place(index)) for index in pair]
        shown = [(contents.name(index), data.splits[kind].read(number, PICTURE_SIZE)) for index, kind, number in places]
        found.append([(name, _picture(pixels)) for name, pixels in shown])
    return found, len(pairs)


def _url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _picture(pixels: np.ndarray) -> str:
    content, kind = io.BytesIO(), "png" if len(pixels) < _SMALL_PICTURE else "jpeg"
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(content, kind, quality=85)
    return _url(content.getvalue(), kind)


def _side_by_side(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template compares: the settings that differ, and recall by class where all have the same classes."""
    names = sorted(set().union(*(run["settings"] for run in runs)))
    rows = [(name, [run["settings"].get(name, "-") for run in runs]) for name in names]
    recalls = [run["report"]["class_accuracy"] if run["report"] else {} for run in runs]
    classes = recalls[0] if len({tuple(each) for each in recalls}) == 1 else ()
    order = sorted(classes, key=lambda name: min(1 if each[name] is None else each[name] for each in recalls))
    return {
        "differing": [(name, values) for name, values in rows if len({str(value) for value in values}) > 1],
        "recalls": [(name, [each[name] for each in recalls]) for name in order[:MAX_ROWS]],
    }
