"""A page about runs: one HTML file without scripts, whose pictures lie inside, so that it can be kept and sent around.

What it shows of names of classes, files, settings and versions is text from strangers. The template report.html escapes
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
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pspinal_jax.environment import versions
from pspinal_jax.errors import PSpinalError, RunError, printable
from pspinal_jax.files import check_target, expanded, write_text
from pspinal_jax.runs.classification_report import MOST_ROWS, percent, without_examples, worst_first
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.evaluate import Evaluated, Mistake, evaluate_examples
from pspinal_jax.runs.metrics import MOST_NUMBERED_CLASSES, plot_confusion, plot_curves

_SMALL_PICTURE = 64


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run as the template asks for it: `evaluated` is None where that was not possible, and `problem` says why."""

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
    def confusions(self) -> list[tuple[str, list[tuple[int, float]]]]:
        """A class's name, and how often and which share of it was taken for each; none where a picture shows more."""
        if self.evaluated is None or len(self.evaluated.classifier.class_names) > MOST_NUMBERED_CLASSES:
            return []
        names = self.evaluated.classifier.class_names
        counts = self.evaluated.scored.confusion(len(names)).toarray()
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        cells = [list(zip(*row, strict=True)) for row in zip(counts.tolist(), shares.tolist(), strict=True)]
        return list(zip(names, cells, strict=True))

    @property
    def mistakes(self) -> list[tuple[Mistake, str, bool]]:
        """The surest mistakes, each with its picture as a URL and whether that is small."""
        return [] if self.evaluated is None else [_with_picture(each) for each in self.evaluated.mistakes()]

    @property
    def settings(self) -> dict[str, Any]:
        return flatten_dict(self.config["identity"] | {"num_seeds": self.config["num_seeds"]}, sep=".")

    @property
    def made_with(self) -> dict[str, Any]:
        device = self.config["device"]
        where = {"data": self.config["data_source"], "device": f"{device['count']} x {device['kind']}"}
        return where | self.config["versions"]

    @property
    def tiles(self) -> list[tuple[str, str]]:
        tiles: list[tuple[str, str]] = []
        if self.report is not None:
            report = self.report
            level = f"{100 * report['intervals']['level']:.0f} %"
            low, high = report["intervals"]["accuracy"]
            tiles.append(
                (percent(report["accuracy"]), f"test accuracy, {level} interval {100 * low:.2f} to {100 * high:.2f}")
            )
            lacking = without_examples(report["classes"])
            for name, label in (("balanced_accuracy", f"balanced accuracy{lacking}"), ("macro_f1", "macro F1")):
                ends = report["intervals"][name]
                interval = f", {100 * ends[0]:.1f} to {100 * ends[1]:.1f}" if ends else ""
                tiles.append((percent(report[name]), label + interval))
            if "top_5_accuracy" in report:
                tiles.append((percent(report["top_5_accuracy"]), "top-5 accuracy"))
            tiles.append((f"{report['loss']:.4f}", "negative log-likelihood, nats"))
            tiles.append(
                (percent(report["calibration_error"]), f"calibration error, {report['calibration_bins']} bins")
            )
        if self.result is not None:
            seeds = self.result["test_accuracy"]
            if seeds["std"] is not None:
                spread = f"{100 * seeds['mean']:.2f} ± {100 * seeds['std']:.2f} %"
                tiles.append((spread, f"mean and standard deviation of {len(seeds['each'])} seeds"))
            tiles.append((f"{self.result['parameters']:,}", "parameters"))
            tiles.append(
                (f"{self.result['seconds']:.1f} s", f"training, and {self.result['compile_seconds']:.1f} s compiling")
            )
        return tiles


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
    title = read[0].name if len(read) == 1 else f"{len(read)} runs"
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        # On one line, and without anything that a reader could take for more; Markup is the template's own.
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    environment.filters["percent"] = percent
    page = environment.get_template("report.html").render(
        title=title, version=versions()["pspinal_jax"], runs=read, most_rows=MOST_ROWS, **_side_by_side(read)
    )
    try:
        write_text(output, page)
    except OSError as error:
        raise RunError(f"{output} cannot be written: {error.strerror or error}") from error
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
        names = list(config["class_names"])
        if evaluated is not None and len(names) > MOST_NUMBERED_CLASSES:
            plot_confusion(evaluated.scored.confusion(len(names)), names, confusion, "")
        return _Run(path, config, result, evaluated, problem, _drawn(curves), _drawn(confusion))


def _drawn(path: Path) -> str:
    """The drawing in `path` as a URL; nothing where it could not be drawn, which a warning has said."""
    return _url(path.read_bytes(), "svg+xml") if path.exists() else ""


def _url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _with_picture(mistake: Mistake) -> tuple[Mistake, str, bool]:
    small = mistake.picture.shape[0] < _SMALL_PICTURE
    content = io.BytesIO()
    picture = Image.fromarray(mistake.picture[..., 0] if mistake.picture.shape[2] == 1 else mistake.picture)
    picture.save(content, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    return mistake, _url(content.getvalue(), "png" if small else "jpeg"), small


def _side_by_side(runs: list[_Run]) -> dict[str, Any]:
    """What the template compares: scores, the settings that differ, and recall by class where all have the same."""
    reports = [run.report for run in runs]
    scores = [
        (label, [_score(report, key) for report in reports])
        for key, label in _COMPARED.items()
        if any(key in (report or ()) for report in reports)
    ]
    scores.append(("mean and std of the seeds", [(_seeds(run), "") for run in runs]))
    for key in ("parameters", "train_examples", "epochs", "seconds"):
        values = ["-" if run.result is None else f"{run.result[key]:,}" for run in runs]
        scores.append((key.replace("_", " "), [(value, "") for value in values]))
    settings = [run.settings for run in runs]
    names = sorted({name for each in settings for name in each})
    rows = [(name, [each.get(name, "-") for each in settings]) for name in names]
    recalls = [report["class_accuracy"] for report in reports if report is not None]
    order: list[str] = []
    if len(recalls) == len(runs) and len({tuple(each) for each in recalls}) == 1:
        order = sorted(recalls[0], key=lambda name: min(1 if each[name] is None else each[name] for each in recalls))
    return {
        "names": [run.name for run in runs],
        "scores": scores,
        "differing": [(name, values) for name, values in rows if len({str(value) for value in values}) > 1],
        "recalls": [(name, [each[name] for each in recalls]) for name in order[:MOST_ROWS]],
    }


_COMPARED = {
    "accuracy": "test accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top_5_accuracy": "top-5 accuracy",
    "loss": "negative log-likelihood, nats",
    "calibration_error": "calibration error",
}


def _score(report: dict[str, Any] | None, key: str) -> tuple[str, str]:
    """A score and its interval, which not all have."""
    if report is None or key not in report:
        return "-", ""
    if key == "loss":
        return f"{report[key]:.4f}", ""
    ends = report["intervals"].get(key)
    return percent(report[key]), f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}" if ends else ""


def _seeds(run: _Run) -> str:
    if run.result is None or run.result["test_accuracy"]["std"] is None:
        return "-"
    seeds = run.result["test_accuracy"]
    return f"{100 * seeds['mean']:.2f} ± {100 * seeds['std']:.2f} % of {len(seeds['each'])}"
