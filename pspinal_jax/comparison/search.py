"""The course of a comparison: tune on validation, train seeds of the best hyper-parameters, evaluate on test once."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from pspinal_jax.comparison.answers import (
    MIN_PROBABILITY,
    Answers,
    as_record,
    calibrated,
    find_temperature,
    log_likelihoods,
    read_records,
)
from pspinal_jax.comparison.baselines import (
    BASELINES,
    BY_LIKELIHOOD,
    FIRST_BASELINES,
    Fitted,
    fit_baseline,
    fit_estimator,
    random_states,
)
from pspinal_jax.comparison.settings import CompareConfig, Scaling, draw_trial, training_seed
from pspinal_jax.comparison.train import Examples, Part, RayTrainer, Schedule, Task, Trainer, build_head
from pspinal_jax.comparison.trial_log import ADVICE, Key, TrialLog
from pspinal_jax.data.dataset import ArraySplit, Dataset, copies_of_a_class, draw_together, split_by_class
from pspinal_jax.errors import UsageError
from pspinal_jax.progress import progress_bar, say
from pspinal_jax.ray import cluster

MIN_STEPS = 600
"""Smallest number of steps of a training if the number of epochs is not given, so small data gets more epochs."""


class Split(NamedTuple):
    """Rows of one split.

    Attributes:
      pool: int [P], sorted, rows for training and validation.
      test: int [T], sorted, rows of the test split.
    """

    pool: np.ndarray
    test: np.ndarray


def make_split(labels: np.ndarray, num_pool: int, number: int, seed: int, copies: np.ndarray | None) -> Split:
    """Split `number` of examples with `labels`.

    Split 0 is the data's own, whose pool comes first. The others draw the same number of test examples of each class
    from all rows. `copies` are integers, equal for rows that are kept together if possible.
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
    """(shift, scale), float32 [D], of (x - shift) * scale, computed from the training rows alone.

    'each': every feature is centred and divided by its standard deviation; a constant feature becomes 0. 'all': one
    mean and one standard deviation for all features, which keeps their proportions. 'none': features are unchanged, and
    pixels (uint8) are scaled to 0 .. 1.
    """
    width = inputs.shape[1]
    if scaling == "none":
        return np.zeros(width, np.float32), np.full(width, 1 / 255 if inputs.dtype == np.uint8 else 1.0, np.float32)
    axis = 0 if scaling == "each" else None
    mean = np.broadcast_to(inputs.mean(axis, dtype=np.float64), width)
    deviation = np.broadcast_to(inputs.std(axis, dtype=np.float64), width)
    constant = deviation <= 1e-6 * np.maximum(np.abs(mean), 1e-30)
    return mean.astype(np.float32), np.where(constant, 0.0, 1 / np.where(constant, 1.0, deviation)).astype(np.float32)


class Comparer:
    """A comparison, from data to records in a trial log.

    Attributes:
      sizes: head -> number of parameters.
      averages: row of mean probabilities over seeds -> head.
      grids: baseline or estimator -> settings to try.
      methods: heads, averages, baselines and estimators, in the order of the table.
      inputs: float32 or uint8 [N, D] of train, validation and test, in this order.
      labels: integers [N].
      splits: rows of each split.
      own_validation: number of rows at the end of the pool that are the data's own validation split; 0 for none.
      rows: (split, seed) -> rows (train, validation); trials use those of seed 0.
      final: kind of the trainings in the table: 'refit', or 'seed' without refits.
      trainers: kind of training -> trainer.
      copies: counts of `pspinal_jax.data.dataset.Contents.find_copies` for the data's own split and the first seed, and
        the number of test examples of drawn splits that are also in their pools.
      choices: (split, method) -> number of the trial that is best on validation.
      seconds: stage -> elapsed time of this process.
    """

    def __init__(
        self,
        data: Dataset[ArraySplit],
        config: CompareConfig,
        log: TrialLog,
        shown: bool,
        estimators: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.config, self.log, self._shown, self._estimators = config, log, shown, estimators
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
        sizes = (self.data.example_shape[0], data.num_classes, config.layer_width, config.num_layers, config.match)
        built = {name: build_head(name, *sizes) for name in config.heads}
        self.heads: dict[str, Any] = {name: head for name, (head, _) in built.items()}
        self.sizes: dict[str, int] = {name: size for name, (_, size) in built.items()}
        self.final = "refit" if config.refit and not log.earlier else "seed"
        if log.earlier and config.metric != "accuracy":
            raise UsageError(
                f"metric is {config.metric}, but {log.workdir} was begun by an earlier version, which recorded "
                f"accuracy alone; {ADVICE}"
            )
        most = max(config.trials, config.num_seeds)
        trainer = self._trainer(self.schedule, most)
        self.trainers = {"trial": trainer, "seed": trainer}
        if self.final == "refit":
            whole = dataclasses.replace(self.schedule, steps=num_pool // config.batch_size)
            self.trainers["refit"] = self._trainer(whole, config.num_seeds)
        averaged = config.heads if config.num_seeds > 1 and not log.earlier else ()
        self.averages: dict[str, str] = {f"{head}_average": head for head in averaged}
        names = () if not config.floors else FIRST_BASELINES if log.earlier else tuple(BASELINES)
        self.grids = {
            name: [{**each, "standardize": scaling} for scaling in self.scalings for each in BASELINES[name]]
            for name in names
        }
        for name, estimator in estimators.items():
            self.grids[name] = [{"estimator": " ".join(repr(estimator).split()), "standardize": "none"}]
        self.methods: list[str] = [*config.heads, *self.averages, *self.grids]
        self.choices: dict[tuple[int, str], int] = {}
        self.seconds = {"floors": 0.0, "trials": 0.0, "seeds": 0.0, "refits": 0.0}

    def _trainer(self, schedule: Schedule, max_slots: int) -> Trainer:
        mode, workers, address = self.config.mode, self.config.workers, self.config.ray_address
        if self.config.engine == "ray":
            return RayTrainer(self.heads, schedule, workers, address)
        return Trainer(self.heads, schedule, max_slots, mode, workers)

    def cluster(self) -> contextlib.AbstractContextManager[None]:
        """In a `with`, the engine is ready; raises as `pspinal_jax.ray.cluster`."""
        ray = self.config.engine == "ray"
        return cluster(self.config.ray_address, self.config.workers) if ray else contextlib.nullcontext()

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
        """The settings and data that determine every record; kept in config.json."""
        deciding = ("seed", "match", "layer_width", "num_layers", "batch_size", "validation_fraction", "standardize")
        return {
            "data_fingerprint": self.data.fingerprint(),
            # Earlier versions had no such entry, and fewer rows.
            **({} if self.log.earlier else {"format": 2}),
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

    def final_numbers(self, method: str) -> list[tuple[str, int]]:
        """Kind and number of the records on each split that belong to the row of `method`."""
        if method in self.averages:
            return [("average", self.config.num_seeds)]
        # On all examples, what draws no random numbers does the same every time.
        drawn = method in self.heads or (method in self._estimators and random_states(self._estimators[method]))
        return [(self.final, n) for n in range(self.config.num_seeds if drawn or self.final == "seed" else 1)]

    def final_records(self, method: str) -> list[list[dict[str, Any]]]:
        """The records that belong to the row of `method`, for each split and training."""
        return [
            [self.record(kind, split, method, number) for kind, number in self.final_numbers(method)]
            for split in range(self.config.splits)
        ]

    def answers(self, method: str) -> Answers:
        """The answers of the row of `method`, repeated if all seeds share one training."""
        records, seeds = self.final_records(method), self.config.num_seeds
        repeated = [each if len(each) == seeds else each * seeds for each in records]
        return read_records(repeated, np.stack([self.labels[split.test] for split in self.splits]))

    def run(self) -> None:
        """Run what is not finished yet."""
        config, kinds = self.config, list(self.trainers)
        if self.log.earlier:
            say(f"{self.log.workdir} was begun by an earlier version; it resumes without refits and new rows")
        each = len(config.heads) * (config.trials + config.num_seeds * (len(kinds) - 1))
        each += sum(1 + config.num_seeds + len(self.final_numbers(name)) * (len(kinds) - 2) for name in self.grids)
        with progress_bar(config.splits * each, "compare", "training", self._shown, unit_scale=False) as self._bar:
            for split in range(config.splits):
                start = time.perf_counter()
                for name in self.grids:
                    self._baseline(split, name)
                self.seconds["floors"] += time.perf_counter() - start
                for kind in kinds:
                    self._train(kind, split, config.trials if kind == "trial" else config.num_seeds)
                for name, head in self.averages.items():
                    self._average(split, name, head)

    @property
    def scalings(self) -> tuple[Scaling, ...]:
        """The possible standardisations of features; pixels always share one mean and standard deviation."""
        if self.config.standardize != "auto":
            return (self.config.standardize,)
        return ("all",) if self.data.example_dtype == np.uint8 else ("each", "all")

    def _train(self, kind: str, split: int, count: int) -> None:
        """The first `count` trials, or seeds of the best trial, of every head."""
        start, tasks, part = time.perf_counter(), list[Task](), cache(self._part)
        for head in sorted(self.sizes, key=lambda head: -self.sizes[head]):  # the longest begin first
            if kind != "trial":
                tried = [self.record("trial", split, head, trial) for trial in range(self.config.trials)]
                self.choices[split, head] = max(range(len(tried)), key=lambda trial: rank(tried[trial]))
            for number in range(count):
                task = self._task(Key(kind, split, head, number), part)
                if self._is_done(task.key, [task.trial.as_json()]) and not self._is_missed(task.key):
                    self._bar.update(1)
                else:
                    tasks.append(task)
        if not tasks:
            return
        for task, outcome, seconds in self.trainers[kind].run(tasks, self._examples(kind, split)):
            key, logits = task.key, self._parts(task.key, outcome.logits)
            record = {"setting": task.trial.as_json(), **self._scores(key, *logits)}
            if kind != "refit":
                record["validation_loss"] = round(float(outcome.losses[: len(logits[0])].mean()), 5)
            record |= {"train_loss": float(outcome.loss), "finite": bool(outcome.finite), "seconds": round(seconds, 3)}
            averaged = kind == self.final and key.method in self.averages.values()
            self.log.add(key, record, calibrated(logits[1], record["temperature"]) if averaged else None)
            self._advance(key)
        self.seconds[f"{kind}s"] += time.perf_counter() - start

    def _task(self, key: Key, part: Callable[[Key, Scaling], Part]) -> Task:
        number = key.number if key.kind == "trial" else self.choices[key.split, key.method]
        trial = draw_trial(self.config, number, self.scalings)
        # Trials have one validation part, the first seed's; all refits have all examples.
        rows = Key(key.kind, key.split, "", key.number if key.kind == "seed" else 0)
        seed = training_seed(self.config.seed, key.kind, key.number)
        return Task(key, key.method, trial, seed, part(rows, trial.standardize))

    def _part(self, key: Key, scaling: Scaling) -> Part:
        """The rows of `key`, those to predict padded to as many as all of its program have."""
        train, evaluated = self._rows(key)
        most = len(evaluated) if key.kind == "refit" else len(self._rows(key._replace(kind="seed"))[1])
        padding = most + -most % self.schedule.eval_batch_size - len(evaluated)
        padded = np.pad(evaluated, (0, padding)).astype(np.int32)
        return Part(train.astype(np.int32), padded, *standardisation(self.inputs[train], scaling))

    def _examples(self, kind: str, split: int) -> Examples:
        """All examples; no training gets a label of the test, and no trial its inputs."""
        inputs, labels, test = self.inputs, self.labels.astype(np.int32), self.splits[split].test
        labels[test] = 0
        if kind == "trial":
            inputs = inputs.copy()
            inputs[test] = 0
        return Examples(inputs, labels)

    def fit_final(self, name: str) -> tuple[Any, np.ndarray, np.ndarray]:
        """(params, shift, scale) of a row's first training on the data's own split, which is repeated.

        `params` are the documented tree of a head, which sees (x - shift) scale; of a linear baseline that of 'dense'.
        """
        key = Key(self.final, 0, name, 0)
        if name in self.heads:
            task = self._task(key, self._part)
            ((_, outcome, _),) = self.trainers[self.final].run([task], self._examples(self.final, 0), with_params=True)
            return outcome.params, task.part.shift, task.part.scale
        ((_, fitted, (shift, scale)),) = self._fitted(key, [self.log.records[key]["setting"]])
        assert fitted.linear is not None
        return {"output": {"kernel": fitted.linear.weights, "bias": fitted.linear.bias}}, shift, scale

    def _rows(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on, and rows to predict: validation but for a refit and then, but for a trial, the test."""
        pool, test = self.splits[key.split]
        if key.kind == "refit":
            return pool, test
        train, validation = self.rows[key.split, key.number if key.kind == "seed" else 0]
        return train, np.concatenate([validation, test if key.kind == "seed" else test[:0]])

    def _is_done(self, key: Key, settings: list[dict[str, Any]]) -> bool:
        """Whether the log has its record, of one of `settings`."""
        record = self.log.records.get(key)
        # As text: in Python, 1 is 1.0 and True.
        texts = (json.dumps(setting, sort_keys=True) for setting in settings)
        return record is not None and json.dumps(record["setting"], sort_keys=True) in texts

    def _is_missed(self, key: Key) -> bool:
        """Whether an average that is not done lacks what this training said."""
        name = f"{key.method}_average"
        if key.kind != self.final or name not in self.averages:
            return False
        done = self._is_done(self._average_key(key.split, name), [self._average_setting(key.split, key.method)])
        return not done and self.log.probabilities(key) is None

    def _average_key(self, split: int, name: str) -> Key:
        return Key("average", split, name, self.config.num_seeds)

    def _average_setting(self, split: int, head: str) -> dict[str, Any]:
        chosen = self.record("trial", split, head, self.choices[split, head])["setting"]
        return {**chosen, "averaged": self.config.num_seeds, "refit": self.final == "refit"}

    def _average(self, split: int, name: str, head: str) -> None:
        """The mean probabilities of a head's seeds."""
        key, setting = self._average_key(split, name), self._average_setting(split, head)
        if self._is_done(key, [setting]):
            return
        keys = [Key(self.final, split, head, number) for number in range(self.config.num_seeds)]
        mean = np.mean([np.asarray(self.log.probabilities(each), np.float32) for each in keys], 0)
        scores = as_record(np.log(np.maximum(mean, MIN_PROBABILITY)), 1.0, self.labels[self.splits[split].test])
        self.log.add(key, {"setting": setting, "validation_accuracy": None, **scores, "seconds": 0.0})

    def _advance(self, key: Key) -> None:
        validation = self.log.records[key]["validation_accuracy"]
        self._bar.set_postfix({key.method: f"{100 * validation:.1f} % of validation"}, refresh=False)
        self._bar.update(1)

    def _parts(self, key: Key, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of `scores` [M, C] of the rows of `key`, and perhaps more rows, those of validation and those of the test."""
        train, evaluated = self._rows(key)
        validation = len(self.splits[key.split].pool) - len(train)
        return scores[:validation], scores[validation : len(evaluated)]

    def _scores(self, key: Key, validation: np.ndarray, test: np.ndarray) -> dict[str, Any]:
        """What a record holds of scores [V, C] and [T, C] of its examples."""
        rows, true = self._rows(key)[1], self.labels[self.splits[key.split].test]
        if key.kind == "refit":  # its validation, and its temperature, are those of the training before
            seed = self.record("seed", key.split, key.method, key.number)
            found = {name: seed[name] for name in ("validation_accuracy", "temperature")}
        else:
            labels = self.labels[rows[: len(validation)]]
            found = {"validation_accuracy": float((validation.argmax(1) == labels).mean())}
            if key.kind == "trial":
                return found
            found["temperature"] = find_temperature(validation, labels)
        return found | as_record(test, found["temperature"], true)

    def _baseline(self, split: int, name: str) -> None:
        """All settings of a baseline as one record (the one that did best), then that one on every seed's split."""
        settings, tuned = self.grids[name], Key("trial", split, name, 0)
        keys = [tuned, *(Key("seed", split, name, seed) for seed in range(self.config.num_seeds))]
        if self.final == "refit":
            keys += [Key(kind, split, name, number) for kind, number in self.final_numbers(name)]
        for key in keys:
            if not self._is_done(key, settings):
                self.log.add(key, self._try_baseline(key, settings))
            self._advance(key)
            settings = [self.log.records[tuned]["setting"]]

    def _try_baseline(self, key: Key, settings: list[dict[str, Any]]) -> dict[str, Any]:
        """The record of the one of `settings` that does best on validation, of equals the first."""
        start, best = time.perf_counter(), dict[str, tuple[float, dict[str, Any]]]()
        for setting, fitted, _ in self._fitted(key, settings):
            parts, scaling = self._parts(key, fitted.scores), setting["standardize"]
            found = {"setting": setting, **self._scores(key, *parts)}
            quality = found["validation_accuracy"]
            if key.method in BY_LIKELIHOOD and key.kind == "trial":
                quality = float(log_likelihoods(parts[0], 1.0, self.labels[self._rows(key)[1]]).mean())
                found["validation_loss"] = round(-quality, 5)
            if scaling not in best or quality > best[scaling][0]:
                best[scaling] = quality, found
        record = max((found for _, found in best.values()), key=lambda found: found["validation_accuracy"])
        return {**record, "seconds": round(time.perf_counter() - start, 3)}

    def _fitted(self, key: Key, settings: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Fitted, Any]]:
        """Each of `settings`, what is fitted to the rows of `key` under it, and how these are scaled."""
        train, evaluated = self._rows(key)
        for scaling in dict.fromkeys(setting["standardize"] for setting in settings):
            alike = [setting for setting in settings if setting["standardize"] == scaling]
            shift, scale = standardisation(self.inputs[train], scaling)
            rows, inputs = ((self.inputs[each].astype(np.float32) - shift) * scale for each in (train, evaluated))
            examples, count = (rows, self.labels[train]), self.data.num_classes
            if (estimator := self._estimators.get(key.method)) is None:
                found = fit_baseline(key.method, alike, examples, inputs, count)
            else:
                seed = training_seed(self.config.seed, key.kind, key.number)
                found = iter([fit_estimator(estimator, examples, inputs, count, seed)])
            for setting, fitted in zip(alike, found, strict=True):
                yield setting, fitted, (shift, scale)


def rank(record: dict[str, Any]) -> tuple[float, float]:
    """The score that trials of a head are chosen by, larger is better: accuracy, then loss.

    The loss term is -inf if the loss is not finite, or unknown in older records.
    """
    loss = record.get("validation_loss")
    return record["validation_accuracy"], -np.inf if loss is None else -loss
