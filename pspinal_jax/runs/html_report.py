"""A page about runs: one HTML file without scripts, whose pictures lie inside, so that it can be kept and sent around.

What it shows of names of classes, files and settings is text from strangers: all of it is escaped, and the page's
Content-Security-Policy lets a browser load nothing and run nothing.
"""

import base64
import dataclasses
import io
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image

from pspinal_jax.environment import versions
from pspinal_jax.errors import PSpinalError, RunError, UsageError, printable
from pspinal_jax.files import expanded, write_text
from pspinal_jax.runs.classification_report import MOST_ROWS, percent, worst_first
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.evaluate import Evaluated, Mistake, evaluate_examples
from pspinal_jax.runs.metrics import plot_confusion, plot_curves

_SMALL_PICTURE = 64
_STYLE = """
:root { --ink: #1c2430; --soft: #5d6b7c; --line: #e3e8ee; --blue: #2563a8; --pale: #eef4fb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8fa; color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 0 0 2px; }
h3 { font-size: 15px; margin: 28px 0 8px; }
p { margin: 4px 0; } .soft, figcaption small { color: var(--soft); } code { font-size: 13px; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 24px 28px; margin-top: 20px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0 4px; }
.tile { background: var(--pale); border-radius: 8px; padding: 10px 14px; min-width: 128px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; font-weight: 650; }
.tile span { font-size: 12.5px; color: var(--soft); display: block; }
.tile.first { background: var(--blue); color: #fff; } .tile.first span { color: #dbe8f7; }
.tile.first b { font-size: 28px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
th { font-weight: 600; font-size: 13px; color: var(--soft); }
tr:last-child td { border-bottom: 0; }
.bar { display: inline-block; width: 110px; height: 8px; border-radius: 4px; background: var(--line);
  margin-left: 10px; }
.bar i { display: block; height: 8px; border-radius: 4px; background: var(--blue); } .bar.low i { background: #c2410c; }
.plot { max-width: 100%; height: auto; display: block; }
.two { display: grid; gap: 28px; grid-template-columns: 1fr 1fr; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 14px; }
figure { margin: 0; font-size: 12.5px; line-height: 1.35; }
figure img { width: 100%; border-radius: 6px; display: block;
  margin-bottom: 4px; background: var(--line); } .tiny { image-rendering: pixelated; }
figcaption { overflow-wrap: anywhere; }
details { margin-top: 18px; } summary { cursor: pointer; font-weight: 600; font-size: 15px; }
.settings td { text-align: left; font-size: 13px; } .note { border-left: 3px solid #c2410c; padding-left: 10px; }
@media (max-width: 760px) { .two { grid-template-columns: 1fr; } }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run as the page tells of it: `evaluated` is None where that was not possible, and `problem` says why."""

    path: Path
    config: dict[str, Any]
    result: dict[str, Any] | None
    lines: list[dict[str, Any]]
    evaluated: Evaluated | None
    problem: str

    @property
    def name(self) -> str:
        return f"{self.config['identity']['card']['name']} in {self.path}"


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
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output is {output}, but {output.parent} is no folder")
    read = [_read(expanded(run), show_progress) for run in runs]
    title = read[0].name if len(read) == 1 else f"{len(read)} runs"
    body = [f"<h1>{_text(title)}</h1>", f'<p class="soft">{_text(_written_by())}</p>']
    if len(read) > 1:
        body += [_compared(read)]
    body += [_section(run, named=len(read) > 1) for run in read]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )
    try:
        write_text(output, page)
    except OSError as error:
        raise RunError(f"{output} cannot be written: {error.strerror or error}") from error
    return [f"{run.path}: {run.problem}" for run in read if run.problem]


def _read(path: Path, show_progress: bool) -> _Run:
    directory = RunDirectory(path)
    config, result = directory.config(), directory.result()
    evaluated, problem = None, ""
    try:
        evaluated = evaluate_examples(path, show_progress=show_progress)
    except PSpinalError as error:
        problem = f"not evaluated: {error}"
    return _Run(path, config, result, directory.metrics(), evaluated, problem)


def _written_by() -> str:
    return "written by pspinal-jax report, version " + versions()["pspinal_jax"]


def _text(value: object) -> str:
    """`value` as text of the page, on one line and without anything that a browser or a reader could take for more."""
    return escape(printable(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"] if head else []
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<table class="{kind}">' + "\n".join(lines) + "</table>"


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _section(run: _Run, named: bool) -> str:
    parts = [f"<h2>{_text(run.name)}</h2>"] if named else []
    if run.result is None:
        parts.append('<p class="note">The run is not finished: what is shown is how far it has come.</p>')
    else:
        parts.append(f'<p class="soft">{_text(run.result["selection"])}</p>')
    if run.problem:
        parts.append(f'<p class="note">{_text(run.problem)}</p>')
    parts.append(_tiles(run))
    with tempfile.TemporaryDirectory() as folder:
        parts.append(_curves(run, Path(folder)))
        if run.evaluated is not None:
            parts += [_classes(run.evaluated.report["classes"]), _confusions(run.evaluated, Path(folder))]
            parts.append(_mistakes(run.evaluated.mistakes()))
    return "<section>" + "\n".join(part for part in parts if part) + _settings(run) + "</section>"


def _tiles(run: _Run) -> str:
    tiles = []
    if run.evaluated is not None:
        report = run.evaluated.report
        level = f"{100 * report['intervals']['level']:.0f} %"
        low, high = report["intervals"]["accuracy"]
        tiles.append(
            (percent(report["accuracy"]), f"test accuracy, {level} interval {100 * low:.2f} to {100 * high:.2f}")
        )
        for name, label in (("balanced_accuracy", "balanced accuracy"), ("macro_f1", "macro F1")):
            low, high = report["intervals"][name]
            tiles.append((percent(report[name]), f"{label}, {100 * low:.1f} to {100 * high:.1f}"))
        if "top_5_accuracy" in report:
            tiles.append((percent(report["top_5_accuracy"]), "top-5 accuracy"))
        tiles.append((f"{report['loss']:.4f}", "negative log-likelihood, nats"))
        tiles.append((percent(report["calibration_error"]), f"calibration error, {report['calibration_bins']} bins"))
    if run.result is not None:
        seeds = run.result["test_accuracy"]
        if seeds["std"] is not None:
            spread = f"{100 * seeds['mean']:.2f} ± {100 * seeds['std']:.2f} %"
            tiles.append((spread, f"mean and standard deviation of {len(seeds['each'])} seeds"))
        tiles.append((f"{run.result['parameters']:,}", "parameters"))
        tiles.append(
            (f"{run.result['seconds']:.1f} s", f"training, and {run.result['compile_seconds']:.1f} s compiling")
        )
    shown = [
        f'<div class="tile{" first" if index == 0 else ""}"><b>{_text(value)}</b><span>{_text(label)}</span></div>'
        for index, (value, label) in enumerate(tiles)
    ]
    method = "" if run.evaluated is None else run.evaluated.report["intervals"]["method"]
    examples = "" if run.evaluated is None else run.evaluated.report["examples"]
    how = f'<p class="soft">Intervals are over the {examples:,} test examples: {_text(method)}.</p>' if method else ""
    return f'<div class="tiles">{"".join(shown)}</div>{how}' if shown else ""


def _curves(run: _Run, folder: Path) -> str:
    if not run.lines:
        return ""
    plot_curves(run.lines, folder / "curves.svg", "")
    return _plot("Learning curves", folder / "curves.svg")


def _plot(title: str, path: Path) -> str:
    """The drawing in `path` under its title; nothing where it could not be drawn, which a warning has said."""
    if not path.exists():
        return ""
    return f'<h3>{title}</h3><img class="plot" alt="{title}" src="{_data(path.read_bytes(), "svg+xml")}">'


def _confusions(evaluated: Evaluated, folder: Path) -> str:
    """The confusion matrix, beside what is most often confused."""
    names, matrix = list(evaluated.classifier.class_names), np.asarray(evaluated.report["confusion"])
    plot_confusion(matrix, names, folder / "confusion.svg", "")
    drawn, pairs = _plot("Confusion matrix", folder / "confusion.svg"), _confused(evaluated.report["most_confused"])
    return f'<div class="two"><div>{drawn}</div><div>{pairs}</div></div>'


def _classes(classes: list[dict[str, Any]]) -> str:
    rows = [
        (
            _text(each["name"]),
            f"{each['support']:,}",
            percent(each["precision"]),
            percent(each["recall"]) + _bar(each["recall"]),
            percent(each["f1"]),
        )
        for each in worst_first(classes)
    ]
    head = ("class, worst first", "examples", "precision", "recall", "F1")
    table = _table(head, rows[:MOST_ROWS])
    if rows[MOST_ROWS:]:
        more = _table(head, rows[MOST_ROWS:])
        table += f"<details><summary>{len(rows) - MOST_ROWS} more classes</summary>{more}</details>"
    return f"<h3>Classes</h3>{table}"


def _bar(share: float | None) -> str:
    width = 0.0 if share is None else 100 * share
    return f'<span class="bar{" low" if width < 50 else ""}"><i style="width:{width:.0f}%"></i></span>'


def _confused(pairs: list[dict[str, Any]]) -> str:
    if not pairs:
        return ""
    rows = [
        (f"{_text(each['true'])} taken for {_text(each['predicted'])}", str(each["count"]), percent(each["share"]))
        for each in pairs
    ]
    return f"<h3>Most often confused</h3>{_table(('pair', 'times', 'of the true class'), rows)}"


def _mistakes(mistakes: list[Mistake]) -> str:
    figures = []
    for each in mistakes:
        small = each.picture.shape[0] < _SMALL_PICTURE
        content = io.BytesIO()
        picture = Image.fromarray(each.picture[..., 0] if each.picture.shape[2] == 1 else each.picture)
        picture.save(content, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
        source = _data(content.getvalue(), "png" if small else "jpeg")
        figures.append(
            f'<figure><img class="{"tiny" if small else ""}" alt="" src="{source}"><figcaption>{_text(each.true)}'
            f"<br><small>taken for {_text(each.predicted)}, {100 * each.probability:.0f} %</small></figcaption>"
            "</figure>"
        )
    return f'<h3>The surest mistakes</h3><div class="sheet">{"".join(figures)}</div>' if figures else ""


def _settings(run: _Run) -> str:
    settings = [(f"<code>{_text(key)}</code>", _text(value)) for key, value in _flat(run).items()]
    device, had = run.config["device"], run.config["versions"]
    where = [("data", run.config["data_source"]), ("device", f"{device['count']} x {device['kind']}")]
    about = [(name, _text(value)) for name, value in [*where, *had.items()]]
    return (
        f"<details><summary>Settings</summary>{_table((), settings, 'settings')}</details>"
        f"<details><summary>Data, device and versions</summary>{_table((), about, 'settings')}</details>"
    )


def _flat(run: _Run) -> dict[str, Any]:
    return flatten_dict(run.config["identity"] | {"num_seeds": run.config["num_seeds"]}, sep=".")


def _compared(runs: list[_Run]) -> str:
    """The runs side by side: scores, the settings that differ, and recall by class where the classes are the same."""
    head = ["", *(_text(run.name) for run in runs)]
    rows = []
    for key, label in _COMPARED.items():
        if any(run.evaluated is not None and key in run.evaluated.report for run in runs):
            rows.append([label, *(_score(run, key) for run in runs)])
    rows.append(["mean and std of the seeds", *(_seeds(run) for run in runs)])
    for key in ("parameters", "train_examples", "epochs", "seconds"):
        values = ["-" if run.result is None else f"{run.result[key]:,}" for run in runs]
        rows.append([key.replace("_", " "), *map(_text, values)])
    flat = [_flat(run) for run in runs]
    names = sorted({name for each in flat for name in each})
    differing = [name for name in names if len({str(each.get(name)) for each in flat}) > 1]
    parts = ["<h2>Side by side</h2>", _table(head, rows)]
    if differing:
        shown = [[f"<code>{_text(name)}</code>", *(_text(each.get(name, "-")) for each in flat)] for name in differing]
        parts += ["<h3>Settings that differ</h3>", _table(head, shown)]
    evaluated = [run.evaluated for run in runs if run.evaluated is not None]
    if len(evaluated) == len(runs) and len({each.classifier.class_names for each in evaluated}) == 1:
        recalls = [each.report["class_accuracy"] for each in evaluated]
        order = sorted(
            recalls[0], key=lambda name: min(each[name] if each[name] is not None else 1 for each in recalls)
        )
        shown = [[_text(name), *(percent(each[name]) + _bar(each[name]) for each in recalls)] for name in order]
        parts += ["<h3>Recall by class, worst first</h3>", _table(head, shown[:MOST_ROWS])]
    return "<section>" + "\n".join(parts) + "</section>"


_COMPARED = {
    "accuracy": "test accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top_5_accuracy": "top-5 accuracy",
    "loss": "negative log-likelihood, nats",
    "calibration_error": "calibration error",
}


def _score(run: _Run, key: str) -> str:
    if run.evaluated is None or key not in run.evaluated.report:
        return "-"
    report = run.evaluated.report
    if key == "loss":
        return f"{report[key]:.4f}"
    low_to_high = report["intervals"].get(key)
    interval = (
        f' <span class="soft">({100 * low_to_high[0]:.1f} to {100 * low_to_high[1]:.1f})</span>' if low_to_high else ""
    )
    return percent(report[key]) + interval


def _seeds(run: _Run) -> str:
    if run.result is None or run.result["test_accuracy"]["std"] is None:
        return "-"
    seeds = run.result["test_accuracy"]
    return f"{100 * seeds['mean']:.2f} ± {100 * seeds['std']:.2f} % of {len(seeds['each'])}"
