"""`pspinal-jax predict RUN_DIR IMAGE...`, `predict --artifact DIR IMAGE...`: class and probability of images."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.errors import UsageError

if TYPE_CHECKING:
    from pspinal_jax.runs.predict import Prediction


@dataclasses.dataclass(frozen=True)
class PredictArguments:
    """Arguments of `predict`."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of a `train`, or the directory of an `export`; with --artifact the first image."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files."""
    artifact: Path | None = None
    """Classify with this export, the directory that `export` wrote, in place of a run."""
    top: int = 1
    """How many classes to name for each image."""
    json: bool = False
    """Print JSON in place of a table."""
    seed_index: int | None = None
    """Which of the run's seeds, from 0; by default the best on validation."""


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status: 1 if an image could not be read."""
    parsed = parse(
        PredictArguments,
        args,
        prog="pspinal-jax predict",
        description="Classify images with the selected parameters of a run, or with an export.",
    )
    source, images = _source_and_images(parsed)
    from pspinal_jax.runs.predict import predict

    predictions = predict(source, images, parsed.top, parsed.seed_index)
    if parsed.json:
        print(json.dumps([_as_json(prediction) for prediction in predictions], indent=2))
    else:
        _print_table([prediction for prediction in predictions if prediction.error is None])
    failed = [prediction for prediction in predictions if prediction.error is not None]
    for prediction in failed:
        print(f"error: {prediction.path}: {prediction.error}", file=sys.stderr)
    return 1 if failed else 0


def _source_and_images(parsed: PredictArguments) -> tuple[Path, tuple[Path, ...]]:
    """The directory to classify with, and the images.

    Raises:
      UsageError: if there are no images, or --artifact stands beside a run directory.
      RunError: if --artifact is no export.
    """
    if parsed.artifact is None:
        if not parsed.images:
            raise UsageError("predict takes a run directory, or --artifact DIR, and at least one image")
        return parsed.run_dir, parsed.images
    if parsed.run_dir.is_dir():
        raise UsageError(f"{parsed.run_dir} is a directory; with --artifact, predict takes images only")
    from pspinal_jax.export.directory import require_export

    require_export(parsed.artifact)
    return parsed.artifact, (parsed.run_dir, *parsed.images)


def _as_json(prediction: "Prediction") -> dict[str, object]:
    classes = [{"class": name, "probability": round(probability, 6)} for name, probability in prediction.classes]
    return {"image": str(prediction.path), "classes": classes, "error": prediction.error}


def _print_table(predictions: Sequence["Prediction"]) -> None:
    rows = [
        (str(prediction.path) if rank == 0 else "", name, f"{100 * probability:.2f} %")
        for prediction in predictions
        for rank, (name, probability) in enumerate(prediction.classes)
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for path, name, probability in rows:
        print(f"{path.ljust(widths[0])}  {name.ljust(widths[1])}  {probability.rjust(widths[2])}")
