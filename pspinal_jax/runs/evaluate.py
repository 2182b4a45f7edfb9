"""`evaluate`: what a run's selected parameters, or an export, do on a test split."""

import contextlib
import dataclasses
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data import Dataset, load_data
from pspinal_jax.data.dataset import Contents, Split
from pspinal_jax.data.images import ImageSplit
from pspinal_jax.data.stream import stream
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import DataError, RunError, UsageError
from pspinal_jax.files import check_target, expanded, write_csv
from pspinal_jax.progress import progress_bar, warn
from pspinal_jax.recipes.schema import Card, DataConfig, Recipe
from pspinal_jax.runs.classification_report import Scored, classification_report, percent, worst_first
from pspinal_jax.runs.classifier import Classifier, load_classifier
from pspinal_jax.runs.directory import changed_classes, data_config, read_json, write_json, writing
from pspinal_jax.runs.metrics import plot_confusion, plot_mistakes
from pspinal_jax.runs.seen import KINDS, read_seen

MOST_MISTAKES = 24
PICTURE_SIDE = 112


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A wrong prediction.

    Attributes:
      true: name of the true class.
      predicted: name of the predicted one.
      probability: of the predicted class.
      picture: uint8 [H, W, C], C 1 or 3, upright, what the model sees, files at 112x112.
    """

    true: str
    predicted: str
    probability: float
    picture: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A classifier's answers for the test split of `data`.

    Attributes:
      classifier: what answered.
      data: its test split was asked.
      scored: the answers.
      report: what `evaluate` returns, without files.
    """

    classifier: Classifier
    data: Dataset[Split]
    scored: Scored
    report: dict[str, Any]

    def mistakes(self, most: int = MOST_MISTAKES) -> list[Mistake]:
        """The surest mistakes, the surest first; none where the examples are no pictures."""
        shape, names = self.data.example_shape, self.classifier.class_names
        if len(shape) != 3 or shape[2] not in (1, 3):
            return []
        turned = self.data.in_memory and self._transposed
        found = []
        for index in self.scored.surest_mistakes(most):
            picture = self.data.test.read(int(index), (PICTURE_SIDE, PICTURE_SIDE))
            found.append(
                Mistake(
                    names[self.scored.labels[index]],
                    names[self.scored.predictions[index]],
                    float(self.scored.confidence[index]),
                    picture.swapaxes(0, 1) if turned else picture,
                )
            )
        return found

    @property
    def _transposed(self) -> bool:
        return bool(_trained_on(self.classifier).transposed)


def evaluate(
    source: str | Path | Classifier,
    seed_index: int | None = None,
    data_path: str | Path | None = None,
    *,
    predictions: str | Path | None = None,
    output: str | Path | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Evaluate exactly, every test example once, and write evaluation.json, classes.csv, confusion.png, mistakes.png.

    They are written into the run. Of other data than the run was trained on they are evaluation-CHECKSUM.json and so
    on, with the data's checksum, and evaluation.json lists them as other_data. Where they cannot be written, a warning
    says so. Nothing is written into an export.

    Args:
      source: run directory, or an export: its directory or a file in it; or a loaded classifier.
      seed_index: which of the run's seeds; by default the best on validation.
      data_path: a data set whose test split is taken in place of the run's own, or all examples of a folder that holds
        no split and is not what the run was trained on; an export needs one.
      predictions: a .csv file to write, a line an example: its file or number, true and predicted class, whether they
        are the same, and the probabilities of the two.
      output: a folder to write to in place of the run.
      show_progress: whether to show a bar on standard error when it takes long.

    Returns:
      What `classification_report` gives, and data, where it came from, data_fingerprint, its checksum, trained_on_it,
      whether this is the data that was trained on (None for an export that does not say), part, what of it was scored
      ('test' or 'all'), seen_in_training, how many of the examples scored the run was trained on and the accuracy of
      the others (None where that is not known: a warning says so), and files, the names of what was written.

    Raises:
      PSpinalError: if the source or the data cannot be read or do not fit each other, the run's own data is no longer
        what it was trained on, its logits are not finite, or `predictions` cannot be written.
    """
    table = None if predictions is None else expanded(predictions)
    if table is not None:
        check_target(table, "--predictions")
    if output is not None:
        check_target(expanded(output), "--output", "evaluation.json", "classes.csv")
    evaluated = evaluate_examples(source, seed_index, data_path, show_progress)
    classifier = evaluated.classifier
    folder = classifier.source if output is None else expanded(output)
    paths = [] if classifier.recipe is None and output is None else _write(folder, evaluated)
    if table is not None:
        write_predictions(table, evaluated)
    if paths:
        _draw(paths, evaluated)
    return evaluated.report | {"files": [path.name for path in paths if path.exists()]}


def evaluate_examples(
    source: str | Path | Classifier,
    seed_index: int | None = None,
    data_path: str | Path | None = None,
    show_progress: bool = False,
) -> Evaluated:
    """As `evaluate`, which see, but nothing is written."""
    enable_compilation_cache()
    classifier = source if isinstance(source, Classifier) else load_classifier(expanded(source), seed_index)
    config, names = _trained_on(classifier), classifier.class_names
    if data_path is None and classifier.recipe is None:
        raise UsageError(
            f"{classifier.source} is an export, which does not know where its data lies; name it with --data.path"
        )
    if data_path is not None:
        config = dataclasses.replace(config, path=Path(data_path))
    # Folders say their classes themselves: how theirs differ from the run's is told below.
    asked = dataclasses.replace(config, num_classes=None if config.image_size else len(names))
    data = load_data(asked, names, needs_test=False)
    if data.class_names != tuple(names):
        raise UsageError(
            f"{data.source} {changed_classes(names, data.class_names)}; {classifier.source} tells its own {len(names)} "
            "classes apart: give those with --data.path, or train again in another --workdir"
        )
    shape, dtype = data.example_shape, data.example_dtype
    if shape != classifier.input_shape or str(dtype) != classifier.input_dtype:
        raise UsageError(
            f"{data.source} has inputs of shape {list(shape)} ({dtype}), but the run was trained on "
            f"{list(classifier.input_shape)} ({classifier.input_dtype})"
        )
    if data.columns and classifier.columns and data.columns != classifier.columns:
        first = next(i for i, pair in enumerate(zip(data.columns, classifier.columns, strict=True)) if len({*pair}) > 1)
        raise UsageError(
            f"feature {first} of {data.source} is {data.columns[first]!r}, but the run was trained on "
            f"{classifier.columns[first]!r} there; give it the run's columns, in their order"
        )
    fingerprint, trained_with = _fingerprint(classifier, config, data), _trained_with(classifier)
    same = None if trained_with is None else fingerprint == trained_with
    if data_path is None and not same:
        raise DataError(
            f"{data.source} is no longer what the run was trained on: examples were added, removed or changed since, "
            "and so may have been its split into training and test examples; put them back, name the data to evaluate "
            "on with --data.path, or train again in another --workdir"
        )
    part = "test"
    if not same and data.uncut is not None:
        data, part = dataclasses.replace(data, splits={**data.splits, "test": data.uncut}), "all"
    turned = data.in_memory and config.transposed and not classifier.transposed
    scored = _score(classifier, data.test, turned=turned, shown=show_progress)
    report = classification_report(scored, names)
    report |= {"data": data.source, "data_fingerprint": fingerprint, "trained_on_it": same, "part": part}
    report["seen_in_training"] = _seen_in_training(classifier, data, scored, same)
    return Evaluated(classifier, data, scored, report)


def _seen_in_training(
    classifier: Classifier, data: Dataset[Split], scored: Scored, same: bool | None
) -> dict[str, Any] | None:
    """Count, and warn of, what the classifier has seen of the test split of `data`; None where that is not known.

    Returns:
      examples, how many it has seen; trained_on, validated_on and trained_on_before, of these by the run and by that
      of --init-from; accuracy_of_others, of all that it has not seen, None where there is nothing else.
    """
    source, test = classifier.source, data.test
    seen = None if classifier.recipe is None else read_seen(source)
    if seen is None and same:
        seen = {"train": np.concatenate([split.digests for name, split in data.splits.items() if name != "test"])}
    if seen is None:
        kind = "an export" if classifier.recipe is None else "a run"
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


def _trained_on(classifier: Classifier) -> DataConfig:
    """How the data of the classifier is read; of an export of before exports said so, as its inputs suggest."""
    if classifier.recipe is not None:
        return classifier.recipe.data
    if "data" in classifier.described:
        return _described_data(classifier)
    shape = classifier.input_shape
    return DataConfig("export", image_size=shape[0] if len(shape) == 3 and shape[2] == 3 else None)


def _described_data(classifier: Classifier) -> DataConfig:
    try:
        config = data_config(classifier.described["data"]["settings"], {})
        Recipe(card=Card("export", "", ""), data=config)  # which checks it
    except (UsageError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{classifier.source} does not say how its data is read: {error}; export the run again"
        ) from None
    return config


def _trained_with(classifier: Classifier) -> str | None:
    """The fingerprint of what the classifier was trained on, where it is known."""
    if classifier.recipe is not None:
        return str(classifier.described["identity"]["data_fingerprint"])
    return classifier.described.get("data", {}).get("fingerprint")


def _fingerprint(classifier: Classifier, config: DataConfig, data: Dataset[Split]) -> str:
    """The checksum of `data` as config.json records it."""
    recipe: Recipe | None = classifier.recipe
    protocol = classifier.described.get("data", {}).get("protocol") if recipe is None else recipe.protocol
    if not data.in_memory and protocol == "validation":
        data = data.with_validation(config.validation_fraction, config.split_seed, config.keep_copies_together)
    return data.fingerprint()


def _score(classifier: Classifier, split: Split, *, turned: bool, shown: bool) -> Scored:
    """The classifier's answers for `split`; the last batch is padded, and what is said of the padding dropped.

    Args:
      classifier: asked.
      split: examples.
      turned: the examples lie transposed, as the run saw them, and an export takes them upright.
      shown: whether to show a bar on standard error.
    """
    parts, size = [], classifier.batch_size
    with (
        progress_bar(len(split), "evaluate", "example", shown, delay=2.0) as bar,
        contextlib.closing(_batches(split, classifier.input_shape, size)) as batches,
    ):
        for inputs, labels in batches:
            padded = np.pad(inputs, [(0, size - len(labels))] + [(0, 0)] * (inputs.ndim - 1))
            rows = classifier.log_probabilities(padded.swapaxes(1, 2) if turned else padded)
            parts.append(Scored.of(labels, rows[: len(labels)]))
            bar.update(len(labels))
    return Scored.joined(parts)


def _batches(split: Split, shape: tuple[int, ...], size: int) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """(examples, labels) of `split` in order, `size` at a time and then what is left."""
    if split.inputs is None:
        yield from stream(split, np.arange(len(split)), (shape[0], shape[1]), size)
        return
    for first in range(0, len(split), size):
        yield split.inputs[first : first + size], split.labels[first : first + size]


def _write(folder: Path, evaluated: Evaluated) -> list[Path]:
    """Write the numbers; returns the paths of `_FILES`, which are others for other data than the run's own."""
    report = evaluated.report
    ending = f"-{report['data_fingerprint']}" if report["trained_on_it"] is False else ""
    paths = [folder / f"{stem}{ending}{kind}" for stem, kind in _FILES]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(paths[0], report)
        _write_classes(paths[1], report["classes"])
    except (RunError, OSError) as error:
        warn(str(error))
        return []
    _list_others(folder)
    return paths


def _draw(paths: Sequence[Path], evaluated: Evaluated) -> None:
    """Draw the pictures among `paths`, those of `_FILES`; what cannot be drawn is a warning."""
    report, names, recipe = evaluated.report, evaluated.classifier.class_names, evaluated.classifier.recipe
    *_, confusion, mistakes = paths
    name = evaluated.classifier.described.get("recipe", "export") if recipe is None else recipe.card.name
    title = f"{name}: {100 * report['accuracy']:.2f} % of {report['examples']} test examples"
    plot_confusion(evaluated.scored.confusion(len(names)), list(names), confusion, title)
    try:
        found = evaluated.mistakes()
    except DataError as error:  # a picture that was there a moment ago
        warn(f"{mistakes} was not drawn: {error}")
        return
    if found:
        captions = [f"{each.true}\nas {each.predicted} {100 * each.probability:.0f} %" for each in found]
        plot_mistakes([each.picture for each in found], captions, mistakes, f"{name}: the surest mistakes")
    elif mistakes.exists():
        mistakes.unlink()  # those of an earlier evaluation, of another seed perhaps


_FILES = (("evaluation", ".json"), ("classes", ".csv"), ("confusion", ".png"), ("mistakes", ".png"))


def _write_classes(path: Path, classes: list[dict[str, Any]]) -> None:
    """The table of classes, worst first; of what cannot be computed, nothing."""
    columns = ("support", "precision", "recall", "f1")
    rows = [[each["name"], *(each[column] for column in columns)] for each in worst_first(classes)]
    with writing(path):
        write_csv(path, ["class", *columns], rows)


def write_predictions(path: Path, evaluated: Evaluated) -> None:
    """Write a line an example; RunError if that is not possible. See `evaluate`."""
    scored, names, split = evaluated.scored, evaluated.classifier.class_names, evaluated.data.test
    rows = []
    for index, (label, predicted) in enumerate(zip(scored.labels, scored.predictions, strict=True)):
        name = Path(split.encoded.name(index)) if isinstance(split, ImageSplit) else index
        probabilities = (scored.confidence[index], np.exp(scored.log_likelihood[index]))
        shown = [f"{value:.6f}" for value in probabilities]
        rows.append([name, names[label], names[predicted], int(label == predicted), *shown])
    with writing(path):
        write_csv(path, ["example", "true", "predicted", "correct", "probability", "probability_of_true"], rows)


def _list_others(run: Path) -> None:
    """Name the evaluations of other data in evaluation.json, where it is there; damaged files are passed over."""
    others = {}
    for path in sorted(run.glob("evaluation-*.json")):
        with contextlib.suppress(RunError, LookupError, TypeError):
            others[path.name] = read_json(path)["data"]
    with contextlib.suppress(RunError, TypeError):
        if others:
            write_json(run / "evaluation.json", read_json(run / "evaluation.json") | {"other_data": others})
