"""A loss, gradient or running statistic that is not finite: stop and say where, or leave the step out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import options

from pspinal_jax.data.dataset import ArraySplit, array_dataset
from pspinal_jax.errors import RunError
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.recipes import DataConfig, ModelConfig, OptimizerConfig, load_recipe
from pspinal_jax.runs.result import load_variables
from pspinal_jax.runs.train import train
from pspinal_jax.training import loop as trainer_module
from pspinal_jax.training.state import EpochMetrics, TrainState
from pspinal_jax.training.step import TrainStep

POISONED = 37


@pytest.fixture
def recipe(monkeypatch):
    """Features of which one example is not a number, as no file that is read could bring in."""
    rng = np.random.default_rng(0)
    labels = (np.arange(64) % 3).astype(np.int32)
    features = (rng.normal(size=(64, 5)) + 2 * labels[:, None]).astype(np.float32)
    poisoned = features.copy()
    poisoned[POISONED] = np.nan
    splits = {"train": ArraySplit(poisoned, labels), "test": ArraySplit(features, labels)}
    data = array_dataset(splits, ("a", "b", "c"), "poisoned")
    monkeypatch.setattr("pspinal_jax.runs.train.load_data", lambda *arguments: data)
    return dataclasses.replace(
        load_recipe("features"),
        data=DataConfig("poisoned"),
        model=ModelConfig(layer_width=8, num_layers=2, dropout_rate=0.0),
        optimizer=OptimizerConfig("sgd", learning_rate=0.05, momentum=0.9),
        epochs=3,
        batch_size=8,
        eval_batch_size=16,
        label_smoothing=0.0,
    )


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_the_run_stops_at_the_step_and_tells_its_examples(recipe, tmp_path, monkeypatch, num_seeds):
    monkeypatch.setattr(trainer_module.Trainer, "_chunk_steps", lambda self, remaining: min(1, remaining))
    recipe = dataclasses.replace(recipe, num_seeds=num_seeds, seed_mode="vmap" if num_seeds > 1 else "auto")
    with pytest.raises(RunError, match=r"a gradient of seed \d is not finite at step \d of epoch 1; .*nonfinite.json"):
        train(recipe, options(tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert POISONED in report["examples"] and len(report["examples"]) == 8
    assert report["learning_rate"] == pytest.approx(0.05) and report["epoch"] == 1
    # What was saved lies before that step; going on comes by it again.
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert all(step < report["step_of_stage"] for step in saved)
    with pytest.raises(RunError, match=f"at step {report['step_of_epoch']} of epoch 1"):
        train(recipe, options(tmp_path / "run"))


def test_such_steps_can_be_left_out(recipe, tmp_path):
    result = train(dataclasses.replace(recipe, on_nonfinite="skip"), options(tmp_path / "run"))
    assert result["test_accuracy"]["mean"] > 0.4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [1, 1, 1]
    assert all(np.isfinite(line["train_loss"]) for line in lines)
    variables, *_ = load_variables(tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def step(params, skip, number=4, totals=None):
    """Step `number` of a model whose loss is finite and whose gradient of 'steep' may not be."""

    def apply(variables, inputs, **options):
        kernel = variables["params"]["kernel"] + jnp.sqrt(variables["params"]["steep"])
        return inputs @ kernel, {}

    state = TrainState(jnp.int32(number), params, {}, optax.identity().init(params))
    batch = (jnp.ones((2, 3)), jnp.array([0, 0]))
    arguments = (state, totals or EpochMetrics.zero(), batch, jnp.float32(0.1), jax.random.key(0))
    return TrainStep(apply, optax.identity(), skip_nonfinite=skip)(*arguments)


@pytest.mark.parametrize("skip", [False, True])
def test_a_gradient_counts_where_the_loss_is_finite(skip):
    # sqrt at 0: the value is 0, the derivative infinite.
    params = {"kernel": jnp.ones((3, 2)), "steep": jnp.zeros((3, 2))}
    state, totals = step(params, skip)
    assert int(totals.bad_step) == 4 and int(state.step) == 5
    assert int(totals.skipped) == skip and int(totals.count) == (0 if skip else 2)
    if skip:
        jax.tree.map(np.testing.assert_array_equal, state.params, params)
    state, totals = step({**params, "steep": jnp.ones((3, 2))}, skip)
    assert int(totals.bad_step) == -1 and int(totals.skipped) == 0 and int(totals.count) == 2
    assert (np.asarray(state.params["kernel"]) != 1).any()


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("skip", [False, True])
def test_a_running_statistic_counts_where_loss_and_gradients_are_finite(skip, micro_batches):
    head, optimizer = ProgressiveSpinalHead(2, 3, num_layers=1, norm="batch", dropout_rate=0.0), optax.identity()
    options = {"ema_decay": 0.9, "micro_batches": micro_batches, "skip_nonfinite": skip}
    train_step = TrainStep(head.apply, optimizer, **options)
    state = train_step.init(head, jax.ShapeDtypeStruct((2, 3), jnp.float32), jnp.uint32(0))
    inputs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)

    def step(inputs):
        batch, key = (inputs, jnp.array([0, 1, 0, 1])), jax.random.key(0)
        arguments = (state, EpochMetrics.zero(), batch, jnp.float32(0.1), key)
        return train_step(*arguments)

    _, totals = step(inputs)
    assert int(totals.bad_step) == -1
    inputs[2, 1] = 1e20  # its square overflows; the layer's outputs do not
    after, totals = step(inputs)
    assert int(totals.bad_step) == 0 and int(totals.skipped) == skip
    assert np.isfinite(after.params["output"]["kernel"]).all() and np.isfinite(totals.loss)
    if skip:
        jax.tree.map(np.testing.assert_array_equal, (after.batch_stats, after.ema), (state.batch_stats, state.ema))


def test_of_several_bad_steps_the_first_is_told_and_all_are_counted():
    bad, good = ({"kernel": jnp.ones((3, 2)), "steep": jnp.full((3, 2), value)} for value in (0.0, 1.0))
    for skip in (False, True):
        totals, told = EpochMetrics.zero(), []
        for number, params in enumerate((good, bad, good, bad)):
            _, totals = step(params, skip, number, totals)
            told.append((int(totals.bad_step), int(totals.skipped)))
        firsts = [(-1, 0), (1, 1), (1, 1), (1, 2)]
        assert told == [(first, skipped * skip) for first, skipped in firsts]
