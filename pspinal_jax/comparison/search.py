"""The order of a comparison: tune on validation, train seeds of the best hyper-parameters, look at the test once."""

import dataclasses
import json
import math
import time
import warnings
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np

from pspinal_jax.comparison.settings import CompareConfig, Scaling, draw_trial, training_seed
from pspinal_jax.comparison.train import Examples, Part, Schedule, Task, Trainer, build_head
from pspinal_jax.comparison.trial_log import Key, TrialLog, packed
from pspinal_jax.data.dataset import ArraySplit, Dataset, copies_of_a_class, draw_together, split_by_class
from pspinal_jax.errors import UsageError
from pspinal_jax.progress import progress_bar

MIN_STEPS = 600
"""A training whose number of epochs is not given has at least so many: little data is seen more often."""
BASELINE_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "knn": [{"metric": metric, "k": k} for metric in ("euclidean", "cosine") for k in (1, 3, 5, 10, 20, 50)],
    # The penalty is on the sum of squares over all training examples.
    "ridge": [{"penalty": float(10.0**exponent)} for exponent in np.arange(-2, 7.5, 0.5)],
}
"""All that is tried; what does best on validation is taken, of equals the first."""


class Split(NamedTuple):
    """Rows of one split.

    Attributes:
      pool: int [P], sorted; a part of these is validated on.
      test: int [T], sorted.
    """

    pool: np.ndarray
    test: np.ndarray


def make_split(labels: np.ndarray, num_pool: int, number: int, seed: int, copies: np.ndarray | None) -> Split:
    """Split `number` of examples with `labels`.

    Split 0 is the data's own, whose pool comes first. The others draw, by class, as many test examples from all as that
    has. `copies`: integers, equal for rows to keep together where that can be.
    """
    rows = np.arange(len(labels))
    if number == 0:
        return Split(rows[:num_pool], rows[num_pool:])
    drawn = []
    for label, count in zip(*np.unique(labels[num_pool:], return_counts=True), strict=True):
        order = np.random.default_rng([seed, number, int(label)]).permutation(np.flatnonzero(labels == label))
        drawn.append(draw_together(order, count, copies, exact=True))
    test = np.sort(np.concatenate(drawn))
    return Split(np.setdiff1d(rows, test), test)


def standardisation(inputs: np.ndarray, scaling: Scaling) -> tuple[np.ndarray, np.ndarray]:
    """(shift, scale), float32 [D], of (x - shift) * scale, from the training rows alone.

    'each': every feature is centred and divided by its standard deviation; a constant one becomes 0. 'all': one mean
    and one deviation for all features, which keeps them in proportion. 'none': features stay as they are, and pixels
    (uint8) go to 0 .. 1.
    """
    width = inputs.shape[1]
    if scaling == "none":
        return np.zeros(width, np.float32), np.full(width, 1 / 255 if inputs.dtype == np.uint8 else 1.0, np.float32)
    axis = 0 if scaling == "each" else None
    mean = np.broadcast_to(inputs.mean(axis, dtype=np.float64), width)
    deviation = np.broadcast_to(inputs.std(axis, dtype=np.float64), width)
    constant = deviation <= 1e-6 * np.maximum(np.abs(mean), 1e-30)
    return mean.astype(np.float32), np.where(constant, 0.0, 1 / np.where(constant, 1.0, deviation)).astype(np.float32)


def predict_baseline(
    settings: list[dict[str, Any]], train: tuple[np.ndarray, np.ndarray], inputs: np.ndarray, num_classes: int
) -> list[np.ndarray]:
    """Predictions int [M] of `inputs` [M, D] under each of `settings`, from `train` (inputs [N, D], labels [N])."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.neighbors import NearestNeighbors

    if "penalty" in settings[0]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a penalty too small for the data, which validation will not choose
            ridges = [RidgeClassifier(alpha=each["penalty"], solver="cholesky").fit(*train) for each in settings]
        return [np.asarray(ridge.predict(inputs)) for ridge in ridges]
    largest, nearest = min(len(train[1]), max(setting["k"] for setting in settings)), {}
    for metric in {setting["metric"] for setting in settings}:  # one search for every k
        model = NearestNeighbors(n_neighbors=largest, metric=metric, algorithm="brute").fit(train[0])
        nearest[metric] = train[1][model.kneighbors(inputs, return_distance=False)]
    return [vote(nearest[setting["metric"]][:, : setting["k"]], num_classes) for setting in settings]


def vote(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The most frequent of each row of `labels` [M, k], nearest first.

    Of equals it is the one with nearer neighbours (the smaller sum of ranks), then the first class; scikit-learn's
    classifier takes the first class.
    """
    rows, k = labels.shape
    votes = np.zeros((rows, num_classes), int)
    for rank in range(k):
        votes[np.arange(rows), labels[:, rank]] += k * k - rank  # all deductions of a row are less than one vote
    return votes.argmax(1)


class Comparer:
    """One comparison on its way from data to records in a trial log.

    Attributes:
      sizes: parameters of each head, by name.
      methods: heads and baselines, in the order of the table.
      inputs: float32 or uint8 [N, D], of train, validation and test, one after the other.
      labels: integers [N].
      splits: rows of each split.
      own_validation: how many at the end of the pool are a validation split of the data's own; 0 for none.
      rows: (split, seed) -> rows (train, validation); trials have those of seed 0.
      copies: see `pspinal_jax.data.dataset.Contents.find_copies`, of the data's own split and the first seed; and
        how many test examples of the splits that are drawn are in their pools too.
      choices: (split, method) -> number of the trial that did best on validation.
      seconds: wall time of what this process did, by stage.
    """

    def __init__(self, data: Dataset[ArraySplit], config: CompareConfig, log: TrialLog, shown: bool) -> None:
        self.config, self.log, self._shown = config, log, shown
        flat = {name: ArraySplit(s.inputs.reshape(len(s), -1), s.labels) for name, s in data.splits.items()}
        self.data = dataclasses.replace(data, splits=flat, example_shape=flat["train"].inputs.shape[1:])
        contents = self.data.contents()
        joined = [flat[name] for name in ("train", "validation", "test") if name in flat]
        self.inputs, self.labels = np.concatenate([split.inputs for split in joined]), contents.labels
        self._copies = copies_of_a_class(contents.digests, self.labels) if log.keep_copies_together else None
        # Where there are several splits, a validation split of the data's own is part of the pool.
        self.own_validation = len(joined[1]) if len(joined) == 3 and config.splits == 1 else 0
        num_pool = len(self.labels) - len(joined[-1])
        self.splits = [
            make_split(self.labels, num_pool, number, config.seed, self._copies) for number in range(config.splits)
        ]
        self.rows = {
            (split, seed): self._cut(self.splits[split].pool, config.seed + seed)
            for split in range(config.splits)
            for seed in range(config.num_seeds)
        }
        train, validation = self.rows[0, 0]
        self.copies = contents.find_copies(train, validation, self.splits[0].test)
        self.copies[0]["test_in_train_of_drawn_splits"] = sum(map(self._copies_apart, self.splits[1:]))
        if not len(validation):
            raise UsageError(f"{data.source}: no example is left to validate on; choose a larger validation_fraction")
        if config.batch_size > len(train):
            raise UsageError(f"batch_size is {config.batch_size}, but only {len(train)} examples are left to train on")
        steps = len(train) // config.batch_size
        epochs = config.epochs or max(20, math.ceil(MIN_STEPS / steps))
        evaluated = len(validation) + len(self.splits[0].test)
        self.schedule = Schedule(epochs, steps, config.batch_size, min(500, evaluated))
        self._num_evaluated = evaluated + -evaluated % self.schedule.eval_batch_size
        sizes = (self.data.example_shape[0], data.num_classes, config.layer_width, config.num_layers, config.match)
        built = {name: build_head(name, *sizes) for name in config.heads}
        self.heads: dict[str, Any] = {name: head for name, (head, _) in built.items()}
        self.sizes: dict[str, int] = {name: size for name, (_, size) in built.items()}
        most = max(config.trials, config.num_seeds)
        self.trainer = Trainer(self.heads, self.schedule, most, config.mode, config.workers)
        self.methods: list[str] = [*config.heads, *(BASELINE_SETTINGS if config.floors else ())]
        self.choices: dict[tuple[int, str], int] = {}
        self.seconds = {"floors": 0.0, "trials": 0.0, "seeds": 0.0}

    def _cut(self, pool: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (train, validation) of a pool; where the data brings no validation split, `seed` cuts it by class.

        Copies go to one side, see `draw_together`; every seed has equally many rows.
        """
        if self.own_validation:
            return pool[: -self.own_validation], pool[-self.own_validation :]
        copies = None if self._copies is None else self._copies[pool]
        train, validation = split_by_class(self.labels[pool], self.config.validation_fraction, seed, copies)
        return pool[train], pool[validation]

    def _copies_apart(self, split: Split) -> int:
        """How many test examples have a copy in the pool, of those that splits keep together where they can."""
        return 0 if self._copies is None else int(np.isin(self._copies[split.test], self._copies[split.pool]).sum())

    def identity(self) -> dict[str, Any]:
        """What decides every record; kept in config.json."""
        deciding = ("seed", "match", "layer_width", "num_layers", "batch_size", "validation_fraction", "standardize")
        return {
            "data_fingerprint": self.data.fingerprint(),
            **{name: getattr(self.config, name) for name in deciding},
            "ranges": {name: list(value) for name, value in self.config.ranges.items()},
            "epochs": self.schedule.epochs,
            # Earlier versions had no such setting, and recorded nothing.
            **({"keep_copies_together": True} if self.log.keep_copies_together else {}),
            "own_validation": self.own_validation,
            "jax_enable_x64": jax.config.values["jax_enable_x64"],
            "jax_default_matmul_precision": jax.config.values["jax_default_matmul_precision"],
        }

    def record(self, kind: str, split: int, method: str, number: int) -> dict[str, Any]:
        """A finished record of the log."""
        return self.log.records[Key(kind, split, method, number)]

    def run(self) -> None:
        """Do what is not yet done."""
        config = self.config
        baselines = tuple(BASELINE_SETTINGS) if config.floors else ()
        each = len(config.heads) * (config.trials + config.num_seeds) + len(baselines) * (1 + config.num_seeds)
        with progress_bar(config.splits * each, "compare", "training", self._shown, unit_scale=False) as self._bar:
            for split in range(config.splits):
                start = time.perf_counter()
                for baseline in baselines:
                    self._baseline(split, baseline)
                self.seconds["floors"] += time.perf_counter() - start
                self._train("trial", split, config.trials)
                for head in config.heads:
                    tried = [self.record("trial", split, head, trial) for trial in range(config.trials)]
                    self.choices[split, head] = max(range(config.trials), key=lambda trial: rank(tried[trial]))
                self._train("seed", split, config.num_seeds)

    @property
    def scalings(self) -> tuple[Scaling, ...]:
        """How features may be standardised; pixels, which all mean the same, are so by one mean and deviation."""
        if self.config.standardize != "auto":
            return (self.config.standardize,)
        return ("all",) if self.data.example_dtype == np.uint8 else ("each", "all")

    def _train(self, kind: str, split: int, count: int) -> None:
        """The first `count` trials, or seeds of the best trial, of every head."""
        start, with_test, tasks = time.perf_counter(), kind == "seed", list[Task]()

        @cache
        def part(number: int, scaling: Scaling) -> Part:
            train, evaluated = self._rows(Key(kind, split, "", number))
            padded = np.pad(evaluated, (0, self._num_evaluated - len(evaluated))).astype(np.int32)
            return Part(train.astype(np.int32), padded, *standardisation(self.inputs[train], scaling))

        for head in sorted(self.sizes, key=lambda head: -self.sizes[head]):  # the longest begin first
            for number in range(count):
                key = Key(kind, split, head, number)
                trial = draw_trial(self.config, self.choices[split, head] if with_test else number, self.scalings)
                if self._is_done(key, [trial.as_json()]):
                    self._bar.update(1)
                    continue
                seed = training_seed(self.config.seed, kind, number)
                tasks.append(Task(key, head, trial, seed, part(number if with_test else 0, trial.standardize)))
        if not tasks:
            return
        inputs, labels, test = self.inputs, self.labels.astype(np.int32), self.splits[split].test
        labels[test] = 0  # no training gets a label of the test, and no trial its inputs
        if not with_test:
            inputs = inputs.copy()
            inputs[test] = 0
        for task, outcome, seconds in self.trainer.run(tasks, Examples(inputs, labels)):
            key = task.key
            losses = outcome.losses[: len(self.rows[split, 0][1])]
            record = {"setting": task.trial.as_json(), **self._scores(key, outcome.predictions)}
            record |= {"validation_loss": round(float(losses.mean()), 5), "train_loss": float(outcome.loss)}
            self.log.add(key, record | {"finite": bool(outcome.finite), "seconds": round(seconds, 3)})
            self._advance(key)
        self.seconds[f"{kind}s"] += time.perf_counter() - start

    def _rows(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on, and rows to predict: validation and then, for a seed, the test."""
        train, validation = self.rows[key.split, key.number if key.kind == "seed" else 0]
        test = self.splits[key.split].test if key.kind == "seed" else validation[:0]
        return train, np.concatenate([validation, test])

    def _is_done(self, key: Key, settings: list[dict[str, Any]]) -> bool:
        """Whether the log has its record, of one of `settings`."""
        record = self.log.records.get(key)
        # As text: in Python, 1 is 1.0 and True.
        texts = (json.dumps(setting, sort_keys=True) for setting in settings)
        return record is not None and json.dumps(record["setting"], sort_keys=True) in texts

    def _advance(self, key: Key) -> None:
        validation = self.log.records[key]["validation_accuracy"]
        self._bar.set_postfix({key.method: f"{100 * validation:.1f} % of validation"}, refresh=False)
        self._bar.update(1)

    def _scores(self, key: Key, predictions: np.ndarray) -> dict[str, Any]:
        """Accuracies on validation and, for a seed, on the test, from predictions of the rows of `key`."""
        rows = self._rows(key)[1]
        validation, test = np.split(predictions[: len(rows)] == self.labels[rows], [len(self.rows[key.split, 0][1])])
        scores: dict[str, Any] = {"validation_accuracy": float(validation.mean())}
        return scores | ({"test_accuracy": float(test.mean()), "test_hits": packed(test)} if len(test) else {})

    def _baseline(self, split: int, baseline: str) -> None:
        """All settings of a baseline as one record (the one that did best), then that one on every seed's split."""
        grid = BASELINE_SETTINGS[baseline]
        settings = [{**each, "standardize": scaling} for scaling in self.scalings for each in grid]
        tuned = Key("trial", split, baseline, 0)
        for key in (tuned, *(Key("seed", split, baseline, seed) for seed in range(self.config.num_seeds))):
            if not self._is_done(key, settings):
                self.log.add(key, self._try_baseline(key, settings))
            self._advance(key)
            settings = [self.log.records[tuned]["setting"]]

    def _try_baseline(self, key: Key, settings: list[dict[str, Any]]) -> dict[str, Any]:
        """The record of the one of `settings` that does best on validation."""
        start, tried = time.perf_counter(), []
        train, evaluated = self._rows(key)
        for scaling in dict.fromkeys(setting["standardize"] for setting in settings):
            alike = [setting for setting in settings if setting["standardize"] == scaling]
            shift, scale = standardisation(self.inputs[train], scaling)
            fitted, inputs = ((self.inputs[rows].astype(np.float32) - shift) * scale for rows in (train, evaluated))
            found = predict_baseline(alike, (fitted, self.labels[train]), inputs, self.data.num_classes)
            tried += [{"setting": each, **self._scores(key, found[i])} for i, each in enumerate(alike)]
        best = max(tried, key=lambda record: record["validation_accuracy"])
        return {**best, "seconds": round(time.perf_counter() - start, 3)}


def rank(record: dict[str, Any]) -> tuple[float, float]:
    """What the trials of a head are chosen by, larger is better: accuracy, and of equal ones the loss.

    The loss is -inf where it is not finite or, in records from before it was kept, not known.
    """
    loss = record.get("validation_loss")
    return record["validation_accuracy"], -np.inf if loss is None else -loss
