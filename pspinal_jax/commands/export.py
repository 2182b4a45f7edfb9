"""`pspinal-jax export RUN_DIR`: a run as a program that JAX alone runs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.errors import printable


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Arguments of `export`."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of a finished `train`."""
    output: Path | None = None
    """The directory to write; by default RUN_DIR/export. An export that is there is replaced, nothing else is."""
    seed_index: int | None = None
    """Which of the run's seeds, from 0; by default the best on validation."""


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    parsed = parse(
        ExportArguments,
        args,
        prog="pspinal-jax export",
        description="Write a run's classifier, images or features to probabilities, as a file for CPU, CUDA and TPU.",
        example="pspinal-jax export runs/digits",
    )
    from pspinal_jax.runs.run import load_run

    output = load_run(parsed.run_dir, parsed.seed_index).export(parsed.output)
    files = ", ".join(f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in sorted(output.iterdir()))
    print(printable(f"written to {output}: {files}"))
    return 0
