"""`suspects`: the least likely labels in a run's data, according to a classifier that has not seen them.

A ridge regression on features (of the frozen backbone, or the inputs of a run on features) is fitted to four fifths of
all examples, train, validation and test together, and predicts the remaining fifth; this is done for each fifth. Copies
and groups are in the same fold. A temperature, fitted to all labels, turns its outputs into probabilities. (Y.
Northcutt et al., "Confident learning", JAIR 2021, discusses their use.) results/suspects.py compares it with others.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from pspinal_jax.data import load_data
from pspinal_jax.data.dataset import Dataset, Split, joined_groups
from pspinal_jax.data.npz import read_npz
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.files import check_target, expanded, write_csv
from pspinal_jax.models import build_model
from pspinal_jax.runs.calibration import fit_temperature
from pspinal_jax.runs.directory import RunDirectory, load_recipe_of, writing
from pspinal_jax.runs.evaluate import PICTURE_SIZE
from pspinal_jax.runs.scores import log_softmax, plot_mistakes
from pspinal_jax.runs.start import FEATURES, extract_features, load_start

FOLDS = 5
_RIDGE = 0.1  # of the features' mean variance; see results/suspects.py
_MAX_SHOWN = 24


@dataclasses.dataclass(frozen=True)
class Suspects:
    """All examples of a data set, the least likely label first.

    Attributes:
      data: the examples.
      order: int64 [N], their numbers among all, train first, then validation and test.
      labels: int32 [N], by that number.
      suggested: int64 [N], the most probable class.
      probabilities: float64 [N, 2], of the label and of that class.
    """

    data: Dataset[Split]
    order: np.ndarray
    labels: np.ndarray
    suggested: np.ndarray
    probabilities: np.ndarray

    def rows(self, most: int | None = None) -> list[tuple[Path, str, str, float, str, float]]:
        """(example, its split, label, its probability, class suggested, its probability) of the first `most`."""
        names, root, found = self.data.class_names, self.data.source + os.sep, []
        for index in self.order[:most].tolist():
            of_label, of_suggested = self.probabilities[index].tolist()
            kind, number = self.data.place(index)
            example = Path(self.data.splits[kind].name(number).removeprefix(root))
            label, suggested = names[self.labels[index]], names[self.suggested[index]]
            found.append((example, kind, label, of_label, suggested, of_suggested))
        return found

    def pictures(self, most: int = _MAX_SHOWN) -> list[tuple[str, str, float, np.ndarray]]:
        """(label, class suggested, its probability, picture) of the first `most` whose label is not the suggested."""
        if len(self.data.example_shape) != 3 or self.data.example_shape[2] not in (1, 3):
            return []
        wrong = self.order[self.labels[self.order] != self.suggested[self.order]][:most]
        names, found = self.data.class_names, []
        for index in wrong.tolist():
            kind, number = self.data.place(index)
            picture = self.data.splits[kind].read(number, PICTURE_SIZE)
            label, suggested = names[self.labels[index]], names[self.suggested[index]]
            found.append((label, suggested, float(self.probabilities[index, 1]), picture))
        return found


def write_suspects(run: str | Path, output: str | Path | None = None) -> tuple[Suspects, list[Path]]:
    """Find the suspects in a run's data, and write suspects.csv and, for pictures, suspects.png.

    Args:
      run: the run directory.
      output: folder for the files, by default the run directory.

    Returns:
      The suspects, and the paths of the files.

    Raises:
      PSpinalError: like `find_suspects`, or if the files cannot be written.
    """
    folder = expanded(run if output is None else output)
    check_target(folder, "--output", "suspects.csv")
    found = find_suspects(run)
    table, sheet = folder / "suspects.csv", folder / "suspects.png"
    columns = ["example", "split", "label", "probability_of_label", "suggested", "probability"]
    rows = [(*row[:3], f"{row[3]:.6f}", row[4], f"{row[5]:.6f}") for row in found.rows()]
    with writing(table):
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(table, columns, rows)
        sheet.unlink(missing_ok=True)
    plot_mistakes(found.pictures(), sheet, "labels to look at")
    return found, [path for path in (table, sheet) if path.exists()]


def find_suspects(run: str | Path) -> Suspects:
    """The suspects in a run's data, see the module's docstring; nothing is written.

    Raises:
      UsageError: if the run's features have seen the labels.
      DataError: if the data is no longer what the run was trained on.
      PSpinalError: if the run or its data cannot be read.
    """
    enable_compilation_cache()
    directory = RunDirectory(expanded(run))
    config = directory.config()
    recipe = load_recipe_of(config)
    data = load_data(recipe.data, config["class_names"])
    if not data.in_memory and recipe.protocol == "validation":
        settings = recipe.data
        data = data.with_validation(settings.validation_fraction, settings.split_seed, settings.keep_copies_together)
    if data.fingerprint() != config["identity"]["data_fingerprint"]:
        raise DataError(f"{data.source} is no longer what the run was trained on; train again in another workdir")
    kinds = [kind for kind in ("train", "validation", "test") if kind in data.splits]
    if recipe.cache_features:
        directory.verify(FEATURES)
        held: Dataset[Any] = read_npz(directory.path / FEATURES, data.num_classes)
    elif data.in_memory:
        held = data
    else:
        start = load_start(directory)
        if "backbone" not in start.get("params", {}):
            raise UsageError(
                f"{run} began with a backbone of random numbers; suspects need features of a pretrained one"
            )
        plain = dataclasses.replace(recipe, feature_views=0)
        model = build_model(plain, data.example_shape, data.num_classes)
        held = extract_features(plain, model, start, data)
    # Of several augmented passes the first.
    features = np.concatenate([held.splits[kind].inputs[: len(data.splits[kind])] for kind in kinds])
    contents = data.contents()
    keys = [contents.digests] if contents.groups is None else [contents.digests, contents.groups]
    log_probabilities = out_of_fold(features.reshape(len(features), -1), contents.labels, joined_groups(*keys))
    rows = np.arange(len(features))
    of_label, suggested = log_probabilities[rows, contents.labels], log_probabilities.argmax(1)
    probabilities = np.exp(np.column_stack([of_label, log_probabilities[rows, suggested]]))
    return Suspects(data, np.argsort(of_label, kind="stable"), contents.labels, suggested, probabilities)


def out_of_fold(features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 [N, C] of features [N, D] by ridge regressions that have not seen their group.

    Args:
      features: numbers.
      labels: integers [N], 0 .. C-1.
      groups: integers [N].
    """
    folds, found = _folds(labels, groups), np.zeros((len(labels), labels.max() + 1))
    for fold in range(FOLDS):
        found[folds == fold] = _ridge(features, labels, folds != fold, found.shape[1])
    # A class that lies in one fold alone was never learnt: nothing is said against its labels.
    learnt = np.array([len(np.unique(folds[labels == label])) > 1 for label in range(found.shape[1])])
    found = log_softmax(found / fit_temperature(found, labels))
    found[np.arange(len(labels))[~learnt[labels]], labels[~learnt[labels]]] = 0.0
    return found


def _folds(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The fold [N] of each example: groups in random order are dealt out, class by class."""
    _, first, number = np.unique(groups, return_index=True, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(first))
    order = order[np.argsort(labels[first[order]], kind="stable")]
    dealt = np.empty(len(first), int)
    dealt[order] = np.arange(len(first)) % FOLDS
    return dealt[number]


def _ridge(features: np.ndarray, labels: np.ndarray, train: np.ndarray, num_classes: int) -> np.ndarray:
    """Outputs [M, C] for the other rows of a ridge regression on the rows `train`."""
    centre = features[train].mean(0, dtype=np.float32)
    known, new = features[train].astype(np.float32) - centre, features[~train].astype(np.float32) - centre
    targets = np.eye(num_classes, dtype=np.float32)[labels[train]]
    mean = targets.mean(0)
    penalty = _RIDGE * max(float(np.square(known).sum()), 1e-12) / min(known.shape)
    if known.shape[1] <= len(known):
        gram = known.T @ known
        gram[np.diag_indices(len(gram))] += penalty
        return mean + new @ cho_solve(cho_factor(gram), known.T @ (targets - mean))
    gram = known @ known.T
    gram[np.diag_indices(len(gram))] += penalty
    return mean + (new @ known.T) @ cho_solve(cho_factor(gram), targets - mean)
