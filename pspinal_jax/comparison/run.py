"""The order of things in a comparison: tune on validation, train seeds of the best setting, look at the test once."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import numpy as np

from pspinal_jax.comparison.floors import FLOORS, FloorName, floor_settings, predict_floor
from pspinal_jax.comparison.heads import HEADS, HeadName, Match, build_head
from pspinal_jax.comparison.ledger import Key, Ledger, packed
from pspinal_jax.comparison.parts import (
    check_sizes,
    flattened,
    make_part,
    make_split,
    standardisation,
)
from pspinal_jax.comparison.program import Outcome, Part, Plan
from pspinal_jax.comparison.runner import Mode, Runner, Task
from pspinal_jax.comparison.settings import Ranges, Scaling, Trial, draw_trial, training_seed
from pspinal_jax.data.dataset import ArraySplit, Dataset, copies_of_a_class
from pspinal_jax.errors import UsageError
from pspinal_jax.progress import progress_bar
from pspinal_jax.training.optimizers import Schedule

LEAST_STEPS = 600
"""Of a training whose epochs are not given: little data is seen more often."""


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What is compared, and how; see `pspinal-jax compare --help`."""

    heads: tuple[HeadName, ...] = HEADS
    floors: bool = True
    trials: int = 16
    num_seeds: int = 5
    splits: int = 1
    seed: int = 0
    match: Match = "published"
    layer_width: int = 256
    num_layers: int = 4
    epochs: int | None = None
    batch_size: int = 64
    validation_fraction: float = 0.2
    standardize: Literal["auto", "each", "all", "none"] = "auto"
    ranges: Ranges = dataclasses.field(default_factory=Ranges)
    mode: Mode = "auto"
    workers: int | None = None
    keep_copies_together: bool = True

    def __post_init__(self) -> None:
        for name in ("trials", "num_seeds", "splits", "layer_width", "num_layers", "batch_size", "epochs", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected at least 1")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"seed is {self.seed}, expected 0 .. 2**31 - 1")
        if not 0 < self.validation_fraction < 1:
            raise UsageError(f"validation_fraction is {self.validation_fraction:g}, expected 0 < FRACTION < 1")
        unknown = [head for head in self.heads if head not in HEADS]
        if unknown or not self.heads or len(set(self.heads)) < len(self.heads):
            raise UsageError(
                f"heads are {' '.join(self.heads) or 'none'}, expected some of {' '.join(HEADS)}, each once"
            )


class Comparer:
    """One comparison on its way from data to lines in a ledger.

    Attributes:
      sizes: parameters of each head, by name.
      methods: floors and heads, in the order of the table.
      source: where the data came from.
      copies: see `pspinal_jax.data.dataset.Contents.find_copies`, of the data's own split and the first seed; and
        how many test examples of the splits that are drawn are in their pools too.
      choices: (split, method) -> number of the trial that did best on validation.
      seconds: wall time of what this process did, by stage.
    """

    def __init__(self, data: Dataset[ArraySplit], config: CompareConfig, ledger: Ledger, shown: bool) -> None:
        self.data, self.config, self.ledger, self._shown = flattened(data), config, ledger, shown
        self.source = data.source
        contents = self.data.contents()
        together = config.keep_copies_together
        copies = copies_of_a_class(contents.digests, contents.labels) if together else None
        self.splits = [make_split(self.data, i, config.splits, config.seed, copies) for i in range(config.splits)]
        self._rows = {
            (split, seed): self.splits[split].rows(config.validation_fraction, config.seed + seed)
            for split in range(config.splits)
            for seed in range(config.num_seeds)
        }
        train, validation = self._rows[0, 0]
        self.copies = contents.find_copies(train, validation, np.arange(self.splits[0].num_pool, len(contents.labels)))
        self.copies[0]["test_in_train_of_drawn_splits"] = sum(split.copies_apart() for split in self.splits[1:])
        check_sizes(train, validation, config.batch_size, data.source)
        epochs = config.epochs or max(20, math.ceil(LEAST_STEPS / (len(train) // config.batch_size)))
        evaluated = len(validation) + len(self.splits[0].test_labels)
        self.plan = Plan(epochs, config.batch_size, min(500, evaluated), Schedule("one_cycle", 1.0))
        width = self.data.example_shape[0]
        built = {
            name: build_head(name, width, data.num_classes, config.layer_width, config.num_layers, config.match)
            for name in config.heads
        }
        self.heads: dict[str, Any] = {name: head for name, (head, _) in built.items()}
        self.sizes: dict[str, int] = {name: size for name, (_, size) in built.items()}
        self.runner = Runner(self.heads, self.plan, max(config.trials, config.num_seeds), config.mode, config.workers)
        self.methods: list[str] = [*config.heads, *(FLOORS if config.floors else ())]
        self.choices: dict[tuple[int, str], int] = {}
        self.seconds = {"floors": 0.0, "trials": 0.0, "seeds": 0.0}

    def identity(self) -> dict[str, Any]:
        """What decides every line; kept in config.json."""
        config = self.config
        return {
            "data_fingerprint": self.data.fingerprint(),
            **{name: getattr(config, name) for name in _DECIDING},
            "ranges": {name: list(value) for name, value in dataclasses.asdict(config.ranges).items()},
            "epochs": self.plan.epochs,
            # Of before there was such a setting, nothing was recorded.
            **({"keep_copies_together": True} if config.keep_copies_together else {}),
            "own_validation": self.splits[0].own_validation,
            "jax_enable_x64": jax.config.values["jax_enable_x64"],
            "jax_default_matmul_precision": jax.config.values["jax_default_matmul_precision"],
        }

    def run(self) -> None:
        """Do what is not yet done."""
        config, lines = self.config, self.ledger.lines
        heads, splits = len(config.heads), config.splits
        floors = sum(config.num_seeds + 1 for _ in FLOORS) if config.floors else 0
        total = splits * (heads * (config.trials + config.num_seeds) + floors)
        with progress_bar(total, "compare", "training", self._shown, unit_scale=False) as self._bar:
            for split in range(splits):
                start = time.perf_counter()
                for floor in FLOORS if config.floors else ():
                    self._floor(split, floor)
                self.seconds["floors"] += time.perf_counter() - start
                trials = [Key("trial", split, head, trial) for head in config.heads for trial in range(config.trials)]
                self._train(split, trials, with_test=False)
                for head in config.heads:
                    tried = [lines[Key("trial", split, head, trial)] for trial in range(config.trials)]
                    self.choices[split, head] = max(range(config.trials), key=lambda trial: rank(tried[trial]))
                seeds = [Key("seed", split, head, seed) for head in config.heads for seed in range(config.num_seeds)]
                self._train(split, seeds, with_test=True)

    def trial_of(self, key: Key) -> Trial:
        """The settings that the training of `key` has: its trial's, or those of the best trial."""
        number = key.number if key.kind == "trial" else self.choices[key.split, key.method]
        return draw_trial(self.config.seed, number, self.config.ranges, self.scalings)

    @property
    def scalings(self) -> tuple[Scaling, ...]:
        """How features may be standardised; pixels, which all mean the same, are so by one mean and deviation."""
        if self.config.standardize != "auto":
            return (self.config.standardize,)
        return ("all",) if self.data.example_dtype == np.uint8 else ("each", "all")

    def _train(self, split: int, keys: Sequence[Key], with_test: bool) -> None:
        start = time.perf_counter()
        missing = [key for key in keys if not self._is_done(key, [self.trial_of(key).as_json()])]
        self._bar.update(len(keys) - len(missing))
        if not missing:
            return
        examples, tasks = self.splits[split], []
        parts: dict[tuple[int, Scaling], Part] = {}
        for key in missing:
            setting, scaling = self.trial_of(key)
            place = key.number if with_test else 0, scaling
            if place not in parts:
                rows = self._rows[split, place[0]]
                parts[place] = make_part(examples, rows, with_test, self.plan.eval_batch_size, scaling)
            seed = training_seed(self.config.seed, key.kind, key.number)
            tasks.append(Task(key, key.method, setting, seed, parts[place]))
        longest_first = sorted(self.sizes, key=lambda head: -self.sizes[head])
        for task, outcome, seconds in self.runner.run(tasks, examples.examples(with_test), longest_first):
            self._finish(task, outcome, seconds)
        self.seconds["seeds" if with_test else "trials"] += time.perf_counter() - start

    def _is_done(self, key: Key, settings: Sequence[dict[str, Any]]) -> bool:
        """Whether the ledger has its line, of one of `settings`."""
        line = self.ledger.lines.get(key)
        # As text: in Python, 1 is 1.0 and True.
        return line is not None and _text(line["setting"]) in map(_text, settings)

    def _finish(self, task: Task, outcome: Outcome, seconds: float) -> None:
        key: Key = task.key
        rows = self._rows[key.split, key.number if key.kind == "seed" else 0]
        right = self._right(key.split, rows[1], np.asarray(outcome.predictions), key.kind == "seed")
        losses = np.asarray(outcome.losses)[: len(rows[1])]
        self.ledger.add(
            key,
            {
                "setting": self.trial_of(key).as_json(),
                **right,
                "validation_loss": round(float(losses.mean()), 5),
                "train_loss": float(outcome.loss),
                "finite": bool(outcome.finite),
                "seconds": round(seconds, 3),
            },
        )
        self._advance(key)

    def _advance(self, key: Key) -> None:
        validation = self.ledger.lines[key]["validation_accuracy"]
        shown = {key.method: f"{100 * validation:.1f} % of validation"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)

    def _right(self, split: int, validation: np.ndarray, predictions: np.ndarray, with_test: bool) -> dict[str, Any]:
        """Accuracies, from predictions of the validation rows and then the test rows."""
        examples = self.splits[split]
        held_out = predictions[: len(validation)] == examples.labels[validation]
        right: dict[str, Any] = {"validation_accuracy": float(held_out.mean())}
        if with_test:
            test = examples.test_labels
            hits = predictions[len(validation) : len(validation) + len(test)] == test
            right |= {"test_accuracy": float(hits.mean()), "test_hits": packed(hits)}
        return right

    def _floor(self, split: int, floor: FloorName) -> None:
        """All settings of a floor as one line (the one that did best), then that one on every seed's split."""
        lines, tuned = self.ledger.lines, Key("trial", split, floor, 0)
        settings = [floor_settings(floor, scaling) for scaling in self.scalings]
        if not self._is_done(tuned, [each for alike in settings for each in alike]):
            tried = [self._try_floor(tuned, alike) for alike in settings]
            best = max(tried, key=lambda line: line["validation_accuracy"])
            self.ledger.add(tuned, {**best, "seconds": round(sum(line["seconds"] for line in tried), 3)})
        self._advance(tuned)
        for seed in range(self.config.num_seeds):
            key, setting = Key("seed", split, floor, seed), lines[tuned]["setting"]
            if not self._is_done(key, [setting]):
                self.ledger.add(key, self._try_floor(key, [setting]))
            self._advance(key)

    def _try_floor(self, key: Key, settings: list[dict[str, Any]]) -> dict[str, Any]:
        """The line of the one of `settings`, standardised alike, that does best on validation."""
        start, examples = time.perf_counter(), self.splits[key.split]
        with_test, floor = key.kind == "seed", cast(FloorName, key.method)
        train, validation = self._rows[key.split, key.number]
        shift, scale = standardisation(examples.inputs[train], settings[0]["standardize"])
        test = np.arange(examples.num_pool, len(examples.labels)) if with_test else np.zeros(0, int)
        fitted, looked_at = (
            (examples.inputs[of].astype(np.float32) - shift) * scale
            for of in (train, np.concatenate([validation, test]))
        )
        predictions = predict_floor(floor, settings, (fitted, examples.labels[train]), looked_at, self.data.num_classes)
        rights = [self._right(key.split, validation, each, with_test) for each in predictions]
        best = int(np.argmax([right["validation_accuracy"] for right in rights]))
        return {"setting": settings[best], **rights[best], "seconds": round(time.perf_counter() - start, 3)}


def rank(line: dict[str, Any]) -> tuple[float, float]:
    """What the trials of a head are chosen by, larger is better: accuracy, and of equal ones the loss.

    The loss is -inf where it is not finite or, in lines from before it was kept, not known.
    """
    loss = line.get("validation_loss")
    return line["validation_accuracy"], -np.inf if loss is None else -loss


def _text(setting: dict[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)


_DECIDING = (
    "seed",
    "match",
    "layer_width",
    "num_layers",
    "batch_size",
    "validation_fraction",
    "standardize",
)
