"""Every pair of training options trains to a finite result, or is refused in one line."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from small_runs import options

from pspinal_jax.data.dataset import ArraySplit, array_dataset
from pspinal_jax.errors import PSpinalError, UsageError
from pspinal_jax.recipes import DataConfig, ModelConfig, OptimizerConfig, load_recipe
from pspinal_jax.recipes.rules import check_settings, check_settings_for
from pspinal_jax.runs.build import split_examples
from pspinal_jax.runs.train import train

OPTIONS = {
    "model.head": ("spinal", "mlp", "dense"),
    "model.norm": ("batch",),
    "model.num_layers": (1,),
    "model.dropout_rate": (0.0, 0.5),
    "model.layer_dropout_rate": (0.3,),
    "model.implementation": ("unrolled", "fused", "scan"),
    "optimizer.name": ("adam", "adamw"),
    "optimizer.learning_rate": (1e-30, 1e30),
    "optimizer.momentum": (0.0,),
    "optimizer.nesterov": (True,),
    "optimizer.weight_decay": (0.1,),
    "optimizer.schedule": ("cosine", "one_cycle", "step"),
    "optimizer.decay_epochs": (1,),
    "optimizer.warmup_epochs": (0.5, 1.99),
    "optimizer.warmup_fraction": (0.0, 0.99),
    "optimizer.steering": ("best_on_test",),
    "data.num_validation": (1, 8),
    "data.drop_remainder": (False,),
    "data.shuffle": (False,),
    "augment.mixup": (0.4,),
    "epochs": (1,),
    "patience": (1,),
    "batch_size": (1, 11, 31),
    "eval_batch_size": (1, 1000),
    "micro_batches": (2, 11),
    "on_nonfinite": ("skip",),
    "label_smoothing": (0.9,),
    "class_weights": ("balanced",),
    "sampler": ("balanced",),
    "gradient_clip": (1e-3,),
    "ema_decay": (0.9,),
    "num_seeds": (2,),
    "seed_mode": ("vmap", "loop"),
    "batch_norm": ("per_device",),
    "dtype": ("bfloat16",),
    "protocol": ("paper",),
    "rounds": (2,),
    "retrain": (True,),
}
"""Beside the defaults of `BASE`: ends of ranges, and what makes the last batch one example (31 examples in threes)."""


def draw(count, seed):
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 3).astype(np.int32)
    return ArraySplit((rng.normal(size=(count, 3)) + 2 * np.eye(3)[labels]).astype(np.float32), labels)


DATA = array_dataset({"train": draw(31, 0), "test": draw(9, 1)}, ("a", "b", "c"), "tiny")
BASE = dataclasses.replace(
    load_recipe("features"),
    data=DataConfig("tiny", drop_remainder=True),
    model=ModelConfig(layer_width=2, num_layers=2),
    optimizer=OptimizerConfig("sgd", learning_rate=0.05),
    epochs=2,
    batch_size=6,
    eval_batch_size=4,
    label_smoothing=0.0,
)
SINGLE = [(name, value) for name, values in OPTIONS.items() for value in values]
PAIRS = [pair for pair in itertools.combinations(SINGLE, 2) if pair[0][0] != pair[1][0]]


def changed(settings):
    """`BASE` with `settings`, checked as `train` does before it begins; UsageError where they are refused."""
    parts, own = {}, {}
    for name, value in settings:
        part, _, field = name.rpartition(".")
        (parts.setdefault(part, {}) if part else own)[field] = value
    own |= {part: dataclasses.replace(getattr(BASE, part), **fields) for part, fields in parts.items()}
    recipe = dataclasses.replace(BASE, **own)
    check_settings(recipe)
    check_settings_for(recipe, DATA.source, DATA.example_shape)
    split_examples(recipe, DATA)
    return recipe


def goes(settings):
    try:
        changed(settings)
    except UsageError as error:
        assert "\n" not in str(error)
        return False
    return True


def covering_rows(pairs):
    """Few lists of settings that are taken together and that hold all `pairs`, each with as many as it can."""
    left, rows = dict.fromkeys(pairs), []
    while left:
        row = list(next(iter(left)))
        for single in sorted(SINGLE, key=lambda each: -sum(each in pair for pair in left)):
            news = any(pair in left for other in row for pair in ((single, other), (other, single)))
            if news and single[0] not in {name for name, _ in row} and goes([*row, single]):
                row.append(single)
        rows.append(row)
        for pair in itertools.permutations(row, 2):
            left.pop(pair, None)
    return rows


TAKEN = [pair for pair in PAIRS if goes(pair)]
ROWS = covering_rows(TAKEN)


def test_the_rows_hold_every_pair_that_is_taken():
    held = {pair for row in ROWS for pair in itertools.permutations(row, 2)}
    assert set(TAKEN) <= held and all(goes(row) for row in ROWS) and len(TAKEN) > len(PAIRS) / 2


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=() if len(row) > 25 else pytest.mark.slow) for row in ROWS], ids=len
)
def test_options_together_end_well_or_in_one_line(row, tmp_path, monkeypatch):
    monkeypatch.setattr("pspinal_jax.runs.train.load_data", lambda *arguments: DATA)
    try:
        train(changed(row), options(tmp_path / "run"))
    except PSpinalError as error:
        assert ("optimizer.learning_rate", 1e30) in row and "\n" not in str(error)
        return

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for text in ((tmp_path / "run" / "result.json").read_text(), *lines):
        json.loads(text, parse_constant=refuse)


def test_a_last_batch_of_one_is_refused_where_batch_norm_learns_from_it():
    norm, kept = ("model.norm", "batch"), ("data.drop_remainder", False)
    with pytest.raises(UsageError, match="batch_size is 6, which leaves 1 example for the last batch"):
        changed([norm, kept])
    changed([norm])
    changed([norm, kept, ("model.head", "dense")])
    held_out = [norm, kept, ("data.num_validation", 8)]
    changed(held_out)
    with pytest.raises(UsageError, match="leaves 1 example"):
        changed([*held_out, ("retrain", True)])
