"""`predict RUN_OR_EXPORT IMAGES...`: classes and probabilities of images, of folders, or of a list of them."""

import codecs
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pspinal_jax.commands import table
from pspinal_jax.commands.parse import parse
from pspinal_jax.errors import RunError, UsageError, printable
from pspinal_jax.files import check_target, json_text, write_csv
from pspinal_jax.progress import say, warn

if TYPE_CHECKING:
    from pspinal_jax.runs.predict import Prediction

STANDARD_INPUT = "-"


@dataclasses.dataclass(frozen=True)
class PredictArguments:
    """Classify images with a run's selected parameters, or with an export."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory written by `train`, or directory written by `export`; with --artifact, the first image."""
    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[IMAGE ..]", help_behavior_hint="")
    ]
    """Image files, or folders with all images in them and their subfolders; - reads a list from standard input, with
    one path per line or NUL between paths. For a run on features: tables (.csv, .tsv, .parquet)."""
    artifact: Path | None = None
    """Directory written by `export`, to use instead of a run."""
    top: int = 1
    """Number of classes to give for each image."""
    csv: Path | None = None
    """File for the predictions, one line per image, instead of the printed table."""
    json: bool = False
    """Print JSON instead of a table."""
    accept: float | None = None
    """Fraction of new pictures of the run's classes to accept as known, by default 0.95; all other pictures are called
    unknown. A larger fraction also accepts more pictures of other things."""
    no_unknown: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Never answer unknown, but always the most probable class."""
    seed_index: int | None = None
    """Index of the seed, from 0; by default the seed that is best on validation."""


def predict(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status: 1 if no image could be read."""
    parsed = parse(PredictArguments, args, "predict", "runs/folder new_pictures --csv predictions.csv")
    source, given = parsed.run_dir, parsed.images
    if parsed.artifact is not None:
        source, given = parsed.artifact, (parsed.run_dir, *parsed.images)
        if (parsed.run_dir / "config.json").is_file():
            raise UsageError(f"{parsed.run_dir} is a run directory; with --artifact, predict takes images only")
    if not given:
        raise UsageError("predict takes a run directory, or --artifact DIR, and at least one image")
    if parsed.no_unknown and parsed.accept is not None:
        raise UsageError(f"accept is {parsed.accept:g}, expected none with --no-unknown")
    if parsed.csv is not None:
        check_target(parsed.csv, "--csv")
    given = _listed(given)
    from pspinal_jax.runs import predict as predictor
    from pspinal_jax.runs.export import require_export

    if parsed.artifact is not None:
        require_export(source)
    start, images = time.perf_counter(), predictor.find_images(given)
    options = {"show_progress": True, "accept": parsed.accept}
    predictions = predictor.predict(source, images, parsed.top, parsed.seed_index, **options)
    if parsed.no_unknown:
        predictions = [dataclasses.replace(each, score=None, known=None) for each in predictions]
    seconds, count = time.perf_counter() - start, len(predictions)
    failed = [prediction for prediction in predictions if prediction.error is not None]
    rows = [
        (printable(prediction.path) if rank == 0 else "", *_cells(prediction, rank))
        for prediction in predictions
        for rank in range(len(prediction.classes))
    ]
    if parsed.csv is not None:
        try:
            _write_csv(parsed.csv, predictions, parsed.top)
        except OSError as error:  # a disk that has become full
            print(table(rows))
            raise RunError(f"{parsed.csv} cannot be written: {error.strerror or error}") from error
    if parsed.json:
        print(json_text([_as_json(prediction) for prediction in predictions], indent=2))
    elif parsed.csv is None and rows:
        print(table(rows))
    if count > 1 or parsed.csv is not None:
        what = "images" if count == len(images) else "rows"
        rate = f"loading and compiling included ({count / seconds:.1f} {what}/s)"
        written = "" if parsed.csv is None else f", written to {parsed.csv}"
        unknown = sum(prediction.known is False for prediction in predictions)
        rejected = f", {unknown} of them unknown" if any(each.known is not None for each in predictions) else ""
        say(f"{count - len(failed)} of {count} {what} classified{rejected} in {seconds:.1f} s, {rate}{written}")
    for prediction in failed:
        warn(f"{prediction.path}: {prediction.error}")
    if len(failed) == count:
        raise RunError("none of the images could be read")
    return 0


def _cells(prediction: "Prediction", rank: int) -> tuple[str, str]:
    name, probability = prediction.classes[rank]
    if rank == 0 and prediction.known is False:
        return f"{prediction.label} (nearest: {printable(name)} {100 * probability:.0f} %)", ""
    return printable(name), f"{100 * probability:6.2f} %"


def _listed(images: Sequence[Path]) -> list[Path]:
    """`images` with what standard input lists in place of '-'."""
    found: list[Path] = []
    for image in images:
        if str(image) != STANDARD_INPUT:
            found.append(image)
            continue
        content = getattr(sys.stdin, "buffer", sys.stdin).read() if sys.stdin is not None else b""
        found += read_list(os.fsencode(content) if isinstance(content, str) else content)
        if not found:
            raise UsageError("standard input lists no image; give one file or folder per line")
    return found


def read_list(content: bytes) -> list[Path]:
    """The files that a list names: a line each, or with NUL between them, as `find -print0` writes.

    UTF-16 and UTF-8 are known by their byte order mark; other bytes are taken as they are.

    Raises:
      UsageError: if it is damaged UTF-16.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeError as error:
            raise UsageError(f"standard input is a damaged list in UTF-16: {error}; write it again") from error
    content = content.removeprefix(codecs.BOM_UTF8)
    names = content.split(b"\0") if b"\0" in content else content.splitlines()
    return [Path(os.fsdecode(name)) for name in names if name.strip()]


def _write_csv(path: Path, predictions: Sequence["Prediction"], top: int) -> None:
    """A line an image, in their order; of what could not be read the error alone."""
    ranks = range(1, top + 1)
    columns = ["image", *(f"{what}_{rank}" if top > 1 else what for rank in ranks for what in ("class", "probability"))]
    rows, scored = [], any(prediction.known is not None for prediction in predictions)
    for prediction in predictions:
        cells = [cell for name, probability in prediction.classes for cell in (name, f"{probability:.6f}")]
        rows.append([prediction.path, *cells, *[""] * (2 * top - len(cells)), prediction.error or ""])
        if scored:
            numbers = ("", "") if prediction.score is None else (int(prediction.known or 0), round(prediction.score, 6))
            rows[-1] += [prediction.label, *numbers]
    write_csv(path, [*columns, "error", *(("label", "known", "score") if scored else ())], rows)


def _as_json(prediction: "Prediction") -> dict[str, object]:
    classes = [{"class": name, "probability": round(probability, 6)} for name, probability in prediction.classes]
    found: dict[str, object] = {"image": str(prediction.path), "classes": classes, "error": prediction.error}
    if prediction.score is not None:
        found |= {"label": prediction.label, "known": prediction.known, "score": round(prediction.score, 6)}
    return found
