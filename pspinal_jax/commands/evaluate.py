"""`pspinal-jax evaluate RUN_DIR`: accuracy by class and confusion matrix of a run's selected parameters."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pspinal_jax.commands.parse import parse


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Arguments of `evaluate`."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of a `train`."""
    seed_index: int | None = None
    """Which of the run's seeds, from 0; by default the best on validation."""
    data_path: Annotated[Path | None, tyro.conf.arg(name="data.path")] = None
    """Evaluate on this data set's test split in place of the run's own."""


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    parsed = parse(
        EvaluateArguments,
        args,
        prog="pspinal-jax evaluate",
        description="Evaluate the selected parameters of a run on the test split.",
    )
    from pspinal_jax.runs.run import load_run

    report = load_run(parsed.run_dir, parsed.seed_index).evaluate(parsed.data_path)
    print(f"test accuracy {100 * report['accuracy']:.2f} % ({report['correct']} of {report['examples']})")
    for name, accuracy in report["class_accuracy"].items():
        shown = "no examples" if accuracy is None else f"{100 * accuracy:.2f} %"
        print(f"  {name}: {shown}")
    print(f"written to {parsed.run_dir}: evaluation.json, confusion.png")
    return 0
