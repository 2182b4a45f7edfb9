"""`pspinal-jax report RUN [RUN ..]`: one HTML page about runs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.errors import UsageError, printable
from pspinal_jax.progress import warn


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """Arguments of `report`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories of `train`; several are shown side by side."""
    output: Path | None = None
    """The page to write; by default report.html in the run directory, of several runs in the current folder."""


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    parsed = parse(
        ReportArguments,
        args,
        prog="pspinal-jax report",
        description="Evaluate runs and write one HTML page about them, with pictures inside and nothing to load.",
        example="pspinal-jax report runs/digits",
    )
    if not parsed.runs:
        raise UsageError("report takes at least one run directory")
    from pspinal_jax.runs.report import write_report

    output = parsed.output or (parsed.runs[0] if len(parsed.runs) == 1 else Path()) / "report.html"
    for problem in write_report(parsed.runs, output, show_progress=True):
        warn(problem)
    print(printable(f"written to {output} ({output.stat().st_size / 1e6:.1f} MB); open it in a browser"))
    return 0
