"""`evaluate`: the scores of a run's selected parameters, or of an export, on a test split."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from pspinal_jax.data import Dataset, load_data
from pspinal_jax.data.dataset import Contents, Split, first_names
from pspinal_jax.data.images import ImageSplit
from pspinal_jax.data.stream import stream
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import DataError, RunError, UsageError
from pspinal_jax.files import check_target, expanded, write_csv
from pspinal_jax.progress import progress_bar, warn
from pspinal_jax.recipes.schema import TABLES, Card, DataConfig, Recipe
from pspinal_jax.runs.directory import RunDirectory, changed_classes, data_config, read_checked, write_json, writing
from pspinal_jax.runs.predict import Predictor, load_predictor
from pspinal_jax.runs.scores import (
    Scored,
    percent,
    plot_confusion,
    plot_mistakes,
    rejections,
    score_report,
    worst_first,
)
from pspinal_jax.runs.start import KINDS, read_seen

_MAX_MISTAKES = 24
PICTURE_SIZE = (112, 112)  # of image files in pictures of them
_ACCEPTED = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)


class _Scores(TypedDict):
    """The entry of evaluation.json that is read back."""

    data: str


class Mistake(NamedTuple):
    """A wrong prediction.

    Attributes:
      true: name of the true class.
      predicted: name of the predicted class.
      probability: probability of the predicted class.
      picture: uint8 [H, W, C], C 1 or 3, upright, as the model sees it; files at 112x112.
    """

    true: str
    predicted: str
    probability: float
    picture: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A predictor's answers for the test split of `data`.

    Attributes:
      predictor: the predictor.
      data: the data set whose test split was evaluated.
      scored: the answers.
      report: the result of `evaluate`, without files.
      transposed: whether the examples of `data` have rows and columns swapped.
    """

    predictor: Predictor
    data: Dataset[Split]
    scored: Scored
    report: dict[str, Any]
    transposed: bool

    def mistakes(self, most: int = _MAX_MISTAKES) -> list[Mistake]:
        """The most confident mistakes, the most confident first; none if the examples are not pictures."""
        shape, names = self.data.example_shape, self.predictor.class_names
        if len(shape) != 3 or shape[2] not in (1, 3):
            return []
        found = []
        for index in self.scored.surest_mistakes(most):
            picture = self.data.test.read(int(index), PICTURE_SIZE)
            picture = picture.swapaxes(0, 1) if self.transposed else picture
            true, predicted = names[self.scored.labels[index]], names[self.scored.predictions[index]]
            found.append(Mistake(true, predicted, float(self.scored.confidence[index]), picture))
        return found


def evaluate(
    source: str | Path | Predictor,
    seed_index: int | None = None,
    data_path: str | Path | None = None,
    *,
    predictions: str | Path | None = None,
    output: str | Path | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Evaluate on every test example once, and write evaluation.json, classes.csv, confusion.png and mistakes.png.

    The files are written into the run directory. For data that the run was not trained on, their names contain the
    data's checksum (evaluation-CHECKSUM.json ..), and evaluation.json lists them as other_data. If they cannot be
    written, a warning says so. Nothing is written into an export.

    Args:
      source: a run directory; an export, as its directory or a file in it; or a loaded predictor.
      seed_index: index of the run's seed; by default the seed that is best on validation.
      data_path: other data to evaluate on, required for an export. Its test split is scored or, for a folder without
        splits that the run was not trained on, all of its examples.
      predictions: a .csv file to write, with a line for each example: its file or number, true and predicted class,
        whether they are equal, and the probabilities of both.
      output: folder for the files, by default the run directory.
      show_progress: whether to show a progress bar on standard error if evaluation takes long.

    Returns:
      The entries of `score_report`, and:

      - rejection: see `rejections`, if the run can reject unknown images
      - data: where the data came from
      - data_fingerprint: checksum of the data
      - trained_on_it: whether the run was trained on this data; None for an export that does not say
      - part: 'test' or 'all', the part that was scored
      - seen_in_training: number of scored examples that the run was trained on, and the accuracy on the others; None,
        with a warning, if that is not known
      - files: names of the files that were written

    Raises:
      PSpinalError: if the source or the data cannot be read or do not match, the run's own data has changed since
        training, its logits are not finite, or `predictions` cannot be written.
    """
    table = None if predictions is None else expanded(predictions)
    if table is not None:
        check_target(table, "--predictions")
    if output is not None:
        check_target(expanded(output), "--output", "evaluation.json", "classes.csv")
    evaluated = evaluate_examples(source, seed_index, data_path, show_progress)
    predictor = evaluated.predictor
    written: list[Path] = []
    if predictor.recipe is not None or output is not None:
        written = _write(predictor.source if output is None else expanded(output), evaluated)
    if table is not None:
        _write_predictions(table, evaluated)
    return evaluated.report | {"files": [path.name for path in written]}


def evaluate_examples(
    source: str | Path | Predictor,
    seed_index: int | None = None,
    data_path: str | Path | None = None,
    show_progress: bool = False,
) -> Evaluated:
    """Like `evaluate`, but without writing files."""
    enable_compilation_cache()
    predictor = source if isinstance(source, Predictor) else load_predictor(source, seed_index)
    config, protocol, trained_with = _trained_on(predictor)
    names = predictor.class_names
    if data_path is not None:
        table = Path(data_path) if config.image_size and Path(data_path).suffix.lower() in TABLES else None
        config = dataclasses.replace(config, path=None if table else Path(data_path), labels=table)
    elif predictor.recipe is None:
        raise UsageError(f"{predictor.source} is an export, which does not store where its data is; give data.path")
    # Folders have names for their classes, which are compared below.
    asked = dataclasses.replace(config, num_classes=None if config.image_size else len(names))
    data = load_data(asked, names, needs_test=False)
    _check_fits(predictor, data)
    cut = data
    if not data.in_memory and protocol == "validation":
        cut = data.with_validation(config.validation_fraction, config.split_seed, config.keep_copies_together)
    fingerprint = cut.fingerprint()
    same = None if trained_with is None else fingerprint == trained_with
    if data_path is None and not same:
        raise DataError(
            f"{data.source} is no longer what the run was trained on: examples were added, removed or changed, so its "
            "test split may differ; restore them, or give other data with data.path"
        )
    part = "test"
    if not same and data.uncut is not None:
        data, part = dataclasses.replace(data, splits={**data.splits, "test": data.uncut}), "all"
    transposed = data.in_memory and config.transposed
    # An export takes upright examples.
    scored = _score(predictor, data.test, turned=transposed and not predictor.transposed, shown=show_progress)
    calibration = predictor.calibration
    report = score_report(scored, names, None if calibration is None else calibration.temperature)
    if calibration is not None and calibration.unknown is not None:
        report["rejection"] = rejections(scored, calibration.unknown.thresholds(_ACCEPTED))
    report |= {"data": data.source, "data_fingerprint": fingerprint, "trained_on_it": same, "part": part}
    report["seen_in_training"] = _seen_in_training(predictor, data, scored, same)
    return Evaluated(predictor, data, scored, report, transposed)


def _trained_on(predictor: Predictor) -> tuple[DataConfig, str | None, str | None]:
    """How the training data is read, its protocol and its checksum; None if an older export does not say."""
    metadata, shape = predictor.metadata, predictor.input_shape
    if predictor.recipe is not None:
        return predictor.recipe.data, predictor.recipe.protocol, metadata["identity"]["data_fingerprint"]
    if "data" not in metadata:
        return DataConfig("export", image_size=shape[0] if shape[2:] == (3,) else None), None, None
    data = metadata["data"]
    try:
        config = data_config(data["settings"], {})
        Recipe(card=Card("export", "", ""), data=config)  # which checks it
    except UsageError as error:
        raise RunError(f"{predictor.source} does not say how its data is read: {error}; export the run again") from None
    return config, data["protocol"], data["fingerprint"]


def _check_fits(predictor: Predictor, data: Dataset[Split]) -> None:
    """Raise UsageError if `data` has other classes, inputs or columns than the training data."""
    names, source = predictor.class_names, predictor.source
    if data.class_names != names:
        raise UsageError(
            f"{data.source} {changed_classes(names, data.class_names)}; {source} knows {len(names)} classes: give "
            "those with data.path, or train again in another workdir"
        )
    found, expected = (data.example_shape, data.example_dtype), (predictor.input_shape, predictor.input_dtype)
    if found != expected:
        raise UsageError(
            f"{data.source} has inputs of shape {list(found[0])} ({found[1]}), but the run was trained on "
            f"{list(expected[0])} ({expected[1]})"
        )
    if data.columns and predictor.columns and data.columns != predictor.columns:
        raise UsageError(
            f"{data.source} has the columns {first_names(data.columns)}, but the run was trained on "
            f"{first_names(predictor.columns)}; give it the run's columns, in their order"
        )


def _seen_in_training(
    predictor: Predictor, data: Dataset[Split], scored: Scored, same: bool | None
) -> dict[str, Any] | None:
    """Count, and warn about, examples of the test split that the predictor has seen; None if that is not known.

    Returns:
      examples, the number that it has seen; trained_on, validated_on and trained_on_before (by the run of --init-from),
      the number of each kind; accuracy_of_others, the accuracy on all others, or None if there are none.
    """
    source, test = predictor.source, data.test
    seen = None if predictor.recipe is None else read_seen(RunDirectory(source))
    if seen is None and same:
        seen = {"train": np.concatenate([split.digests for name, split in data.splits.items() if name != "test"])}
    if seen is None:
        kind = "an export" if predictor.recipe is None else "a run"
        warn(f"{source} is {kind} without checksums: it may have been trained on these examples")
        return None
    masks = {kind: np.isin(test.digests, seen.get(kind, ())) for kind in KINDS}
    known = np.logical_or.reduce(list(masks.values()))
    others = (scored.predictions == scored.labels)[~known]
    accuracy = float(others.mean()) if len(others) else None
    if known.any():
        root = data.source + os.sep
        contents = Contents(test.digests, test.labels, lambda index: test.name(index).removeprefix(root))
        text = f"{known.sum():,} of the {len(known):,} examples scored were trained or validated on"
        rest = "" if accuracy is None else f"; accuracy on the {len(others):,} others: {percent(accuracy)}"
        warn(f"{text}: {contents.named(np.flatnonzero(known))}{rest}")
    names = ("trained_on", "validated_on", "trained_on_before")
    counts = {name: int(mask.sum()) for name, mask in zip(names, masks.values(), strict=True)}
    return {"examples": int(known.sum()), **counts, "accuracy_of_others": accuracy}


def _score(predictor: Predictor, split: Split, *, turned: bool, shown: bool) -> Scored:
    """The predictor's answers for `split`.

    Args:
      predictor: the predictor.
      split: the examples.
      turned: whether the examples are transposed, as the run saw them, while an export takes them upright.
      shown: whether to show a progress bar on standard error.
    """
    parts, size = [], predictor.batch_size
    temperature = None if predictor.calibration is None else predictor.calibration.temperature
    batches: Iterator[tuple[np.ndarray, np.ndarray]]
    with contextlib.ExitStack() as opened:
        bar = opened.enter_context(progress_bar(len(split), "evaluate", "example", shown, delay=2.0))
        numbers = np.split(np.arange(len(split)), range(size, len(split), size))
        if (arrays := split.inputs) is None:
            height, width, _ = predictor.input_shape
            batches = opened.enter_context(contextlib.closing(stream(split, numbers, (height, width))))
        else:
            batches = ((arrays[each], split.labels[each]) for each in numbers)
        for inputs, labels in batches:
            padded = np.pad(inputs, [(0, size - len(labels))] + [(0, 0)] * (inputs.ndim - 1))
            rows, known = predictor.answers(padded.swapaxes(1, 2) if turned else padded)
            known = None if known is None else known[: len(labels)]
            parts.append(Scored.of(labels, rows[: len(labels)], known, temperature))
            bar.update(len(labels))
    return Scored.joined(parts)


def _write(folder: Path, evaluated: Evaluated) -> list[Path]:
    """Write scores and pictures, and return their paths; warn if they cannot be written."""
    report, predictor = evaluated.report, evaluated.predictor
    ending = f"-{report['data_fingerprint']}" if report["trained_on_it"] is False else ""
    names = (f"evaluation{ending}.json", f"classes{ending}.csv", f"confusion{ending}.png", f"mistakes{ending}.png")
    scores, table, confusion, mistakes = paths = [folder / name for name in names]
    columns = ("support", "precision", "recall", "f1")
    rows = [[each["name"], *(each[column] for column in columns)] for each in worst_first(report["classes"])]
    name = predictor.metadata.get("recipe", "export") if predictor.recipe is None else predictor.recipe.card.name
    title = f"{name}: {100 * report['accuracy']:.2f} % of {report['examples']} test examples"
    classes = predictor.class_names
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(scores, report)
        with writing(table):
            write_csv(table, ["class", *columns], rows)
            mistakes.unlink(missing_ok=True)  # those of an earlier evaluation, of another seed perhaps
    except RunError as error:
        warn(str(error))
        return []
    _list_others(folder)
    plot_confusion(evaluated.scored.confusion(len(classes)), classes, confusion, title)
    try:
        plot_mistakes(evaluated.mistakes(), mistakes, f"{name}: the most confident mistakes")
    except DataError as error:  # an image that has gone since
        warn(f"{mistakes} was not drawn: {error}")
    return [path for path in paths if path.exists()]


def _write_predictions(path: Path, evaluated: Evaluated) -> None:
    """Write a line for each example, see `evaluate`; raise RunError if that fails."""
    scored, names, split = evaluated.scored, evaluated.predictor.class_names, evaluated.data.test
    rows = []
    threshold = evaluated.predictor.threshold()
    columns = ["example", "true", "predicted", "correct", "probability", "probability_of_true"]
    columns += [] if threshold is None else ["known", "score"]
    for index, (label, predicted) in enumerate(zip(scored.labels, scored.predictions, strict=True)):
        name = Path(split.name(index)) if isinstance(split, ImageSplit) else index
        probabilities = (scored.confidence[index], np.exp(scored.log_likelihood[index]))
        shown: list[object] = [f"{value:.6f}" for value in probabilities]
        if threshold is not None:
            shown += [int(scored.known[index] >= threshold), round(float(scored.known[index]), 6)]
        rows.append([name, names[label], names[predicted], int(label == predicted), *shown])
    with writing(path):
        write_csv(path, columns, rows)


def _list_others(run: Path) -> None:
    """List the evaluations of other data in evaluation.json, without damaged files."""
    others = {}
    for path in sorted(run.glob("evaluation-*.json")):
        with contextlib.suppress(RunError):
            others[path.name] = read_checked(path, _Scores)["data"]
    with contextlib.suppress(RunError):
        if others:
            report = read_checked(run / "evaluation.json", _Scores)
            write_json(run / "evaluation.json", report | {"other_data": others})
