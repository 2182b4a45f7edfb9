"""`evaluate RUN_OR_EXPORT`: scores on the test split. `report RUN [RUN ..]`: an HTML page about runs. `suspects RUN`:
labels that look wrong.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pspinal_jax.commands import table
from pspinal_jax.commands.parse import parse
from pspinal_jax.errors import UsageError, printable
from pspinal_jax.progress import warn


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate a run's selected parameters, or an export, on the test split."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory written by `train`, or directory written by `export`."""
    seed_index: int | None = None
    """Index of the seed, from 0; by default the seed that is best on validation."""
    data_path: Annotated[Path | None, tyro.conf.arg(name="data.path")] = None
    """Other data to evaluate on: its test split or, for a folder without splits, all of its pictures. Required for an
    export."""
    predictions: Path | None = None
    """Also write each example's prediction to this .csv file."""
    output: Path | None = None
    """Folder for evaluation.json, classes.csv, confusion.png and mistakes.png; by default the run directory. For an
    export, nothing is written by default."""


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """Evaluate runs and write a self-contained HTML page about them."""

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ..]", help_behavior_hint="")
    ]
    """Run directories written by `train`; several are shown side by side."""
    output: Path | None = None
    """File to write; by default report.html in the run directory or, for several runs, in the current folder."""


@dataclasses.dataclass(frozen=True)
class SuspectsArguments:
    """List the least likely labels in a run's data, according to a classifier on its features that never saw them."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory written by `train`, on cached features, on features, or on pictures with a pretrained backbone."""
    top: int = 20
    """Number of examples to print; suspects.csv has all of them, the least likely label first."""
    output: Path | None = None
    """Folder for suspects.csv and for suspects.png with the first pictures; by default the run directory."""


def evaluate(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    parsed = parse(EvaluateArguments, args, "evaluate", "runs/digits --predictions predictions.csv")
    from pspinal_jax.runs.evaluate import evaluate as evaluate_run
    from pspinal_jax.runs.report import describe_scores

    written = {"predictions": parsed.predictions, "output": parsed.output}
    report = evaluate_run(parsed.run_dir, parsed.seed_index, parsed.data_path, **written, show_progress=True)
    if not report["trained_on_it"]:
        part = "its test split" if report["part"] == "test" else f"all {report['examples']} examples: it holds no split"
        unknown = report["trained_on_it"] is None
        on = "on" if unknown else "on other data than the run was trained on:"
        end = "; the export does not say what it was trained on" if unknown else ""
        print(printable(f"{on} {report['data']}, {part}{end}"))
    print("\n".join(describe_scores(report)))
    if report["files"]:
        print(printable(f"written to {parsed.output or parsed.run_dir}: {', '.join(report['files'])}"))
    if parsed.predictions is not None:
        print(printable(f"each prediction in {parsed.predictions}"))
    return 0


def report(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    parsed = parse(ReportArguments, args, "report", "runs/digits")
    if not parsed.runs:
        raise UsageError("report takes at least one run directory")
    from pspinal_jax.runs.report import write_report

    output = parsed.output or (parsed.runs[0] if len(parsed.runs) == 1 else Path()) / "report.html"
    for problem in write_report(parsed.runs, output, show_progress=True):
        warn(problem)
    print(printable(f"written to {output} ({output.stat().st_size / 1e6:.1f} MB); open it in a browser"))
    return 0


def suspects(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    parsed = parse(SuspectsArguments, args, "suspects", "runs/folder")
    if parsed.top < 0:
        raise UsageError(f"top is {parsed.top}, expected 0 or more")
    from pspinal_jax.runs.suspects import write_suspects

    found, files = write_suspects(parsed.run_dir, parsed.output)
    rows = [("example", "split", "label", "", "looks like", "")]
    for example, split, label, of_label, suggested, probability in found.rows(parsed.top):
        rows.append((str(example), split, label, f"{of_label:.2%}", suggested, f"{probability:.2%}"))
    print(table([printable(cell) for cell in row] for row in rows))
    print(printable(f"{len(found.order):,} examples, the least likely label first: {', '.join(map(str, files))}"))
    return 0
