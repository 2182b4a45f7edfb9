"""Frozen entries, micro-batches, and steps on batches that the host brings."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps_support import make_programs

from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.models import Classifier
from pspinal_jax.training.keys import make_order
from pspinal_jax.training.optimizers import make_optimizer
from pspinal_jax.training.state import EpochMetrics, TrainState, head_layouts
from pspinal_jax.training.step import EpochPlan, TrainStep

RNG = np.random.default_rng(0)
INPUTS = RNG.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
LABELS = RNG.integers(0, 3, 40).astype(np.int32)
SEED = np.uint32(5)


class Backbone(nn.Module):
    """A dense layer with batch norm and dropout-free features."""

    norm: bool = True

    @nn.compact
    def __call__(self, images, train):
        features = nn.Dense(6)(images.reshape(len(images), -1))
        if self.norm:
            features = nn.BatchNorm(use_running_average=not train, momentum=0.5)(features)
        return nn.relu(features)


def programs(frozen=(), norm=True, dropout_rate=0.2, optimizer="adamw", **options):
    head = ProgressiveSpinalHead(
        3, 4, num_layers=2, dropout_rate=dropout_rate, norm="batch" if norm else None, implementation="auto"
    )
    model = Classifier(head=head, backbone=Backbone(norm), mean=0.4, std=0.3, freeze_backbone=bool(frozen))
    direction = make_optimizer(optimizer, weight_decay=0.01)
    return make_programs(model, direction, (4, 4, 1), np.uint8, 8, 8, label_smoothing=0.1, frozen=frozen, **options)


def plan(steps=5):
    order = make_order(np.arange(40), 40, vectorized=False)(SEED, np.int32(0))
    return EpochPlan(order, np.full(steps, 0.05, np.float32))


def train(run, steps=5):
    state, totals = run.init(SEED), run.zero_totals(SEED)
    return run.chunk(state, totals, SEED, plan(), np.int32(0), np.int32(steps), (INPUTS, LABELS))


def train_by_batches(run, steps=5):
    state, totals = run.init(SEED), run.zero_totals(SEED)
    order = np.asarray(plan().order)
    for step in range(steps):
        rows = order[8 * step : 8 * step + 8]
        batch = run.shard_batch((INPUTS[rows], LABELS[rows]))
        state, totals = run.batch_step(state, totals, SEED, np.float32(0.05), batch)
    return state, totals


@pytest.mark.parametrize("head_layout", ["tree", "fused"])
def test_a_frozen_backbone_stays_bit_for_bit(head_layout):
    run = programs(frozen=("backbone",), head_layouts=head_layouts(head_layout))
    before = jax.tree.map(np.array, run.init(SEED))
    after, _ = train(run)
    for collection in ("params", "batch_stats"):
        chex.assert_trees_all_equal(getattr(before, collection)["backbone"], getattr(after, collection)["backbone"])
        moved = jax.tree.map(
            lambda old, new: bool((old != np.asarray(new)).any()),
            getattr(before, collection)["head"],
            getattr(after, collection)["head"],
        )
        assert any(jax.tree.leaves(moved))
    # The optimiser knows nothing of it.
    shapes = {leaf.shape for leaf in jax.tree.leaves(after.opt_state)}
    assert (16, 6) not in shapes and (6, 4) in shapes


@pytest.mark.slow
def test_a_frozen_backbone_is_the_head_trained_on_its_features():
    # SGD: AdamW makes much of the rounding in the gradients of biases that batch norm cancels.
    run = programs(frozen=("backbone",), optimizer="sgd")
    state = run.init(SEED)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    model = Classifier(head=nn.Dense(1), backbone=Backbone(), mean=0.4, std=0.3)
    features = np.asarray(model.apply(variables, jnp.asarray(INPUTS), False, method="features"))
    head = ProgressiveSpinalHead(3, 4, num_layers=2, dropout_rate=0.2, norm="batch")
    on_features = make_programs(
        Classifier(head=head), make_optimizer("sgd"), (6,), np.float32, 8, 8, label_smoothing=0.1
    )
    start = on_features.init(SEED)
    start = start.replace(params={"head": state.params["head"]}, batch_stats={"head": state.batch_stats["head"]})
    direct, totals = on_features.chunk(
        start, on_features.zero_totals(SEED), SEED, plan(), np.int32(0), np.int32(5), (features, LABELS)
    )
    whole, whole_totals = train(run)
    chex.assert_trees_all_close(whole.params["head"], direct.params["head"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole_totals.loss, totals.loss, rtol=1e-5)


def test_steps_on_the_hosts_batches_equal_the_compiled_epoch():
    chunk, batches = train(programs()), train_by_batches(programs())
    chex.assert_trees_all_close(chunk, batches, rtol=2e-5, atol=1e-6)
    assert int(batches[0].step) == 5 and int(batches[1].count) == 40


def test_micro_batches_give_the_gradient_of_the_batch():
    """Without batch norm and dropout, splitting the batch changes nothing but rounding."""
    options = {"norm": False, "dropout_rate": 0.0, "optimizer": "sgd"}
    whole, totals = train(programs(**options))
    split, split_totals = train(programs(**options, micro_batches=4))
    chex.assert_trees_all_close(whole.params, split.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(totals.loss, split_totals.loss, rtol=1e-5)
    assert int(totals.metrics["correct"]) == int(split_totals.metrics["correct"]) and int(split_totals.count) == 40


def test_each_micro_batch_updates_the_running_statistics_in_turn():
    run = programs(micro_batches=2)
    start = run.init(SEED)
    dense = jax.tree.map(np.array, start.params["backbone"]["Dense_0"])
    rows = np.asarray(plan().order)[:8]
    mean = np.zeros(6)
    for part in (rows[0::2], rows[1::2]):
        images = (INPUTS[part].reshape(4, 16) / 255 - 0.4) / 0.3
        mean = 0.5 * mean + 0.5 * (images @ dense["kernel"] + dense["bias"]).mean(0)
    state, totals = train(run, steps=1)
    np.testing.assert_allclose(state.batch_stats["backbone"]["BatchNorm_0"]["mean"], mean, rtol=1e-4, atol=1e-5)
    assert int(totals.count) == 8 and int(state.step) == 1


def test_each_micro_batch_has_dropout_masks_of_its_own():
    """A model that writes down the keys it is given, and the examples, in its running statistics."""

    def apply(variables, inputs, train, rngs, mutable):
        seen = variables["batch_stats"]
        new = {"keys": jax.random.key_data(rngs["dropout"])[None], "inputs": inputs[None, :, 0]}
        updated = {name: jnp.concatenate([seen[name][1:], each]) for name, each in new.items()}
        return inputs @ variables["params"]["kernel"], {"batch_stats": updated}

    optimizer, key = make_optimizer("sgd"), jax.random.key(7)
    params = {"kernel": jnp.ones((1, 3))}
    stats = {"keys": jnp.zeros((4, 2), jnp.uint32), "inputs": jnp.zeros((4, 2))}
    state = TrainState(jnp.int32(0), params, stats, optimizer.init(params))
    batch = (jnp.arange(8.0)[:, None], jnp.arange(8) % 3)
    step = TrainStep(apply, optimizer, micro_batches=4)
    state, _ = step(state, EpochMetrics.zero(), batch, jnp.float32(0.1), key)
    expected = np.stack([jax.random.key_data(jax.random.fold_in(key, index)) for index in range(4)])
    np.testing.assert_array_equal(state.batch_stats["keys"], expected)
    np.testing.assert_array_equal(state.batch_stats["inputs"], np.arange(8).reshape(2, 4).T)


def test_a_last_smaller_batch_from_the_host_is_not_split():
    run = programs(micro_batches=4)
    state, totals = run.init(SEED), run.zero_totals(SEED)
    state, totals = run.batch_step(state, totals, SEED, np.float32(0.1), run.shard_batch((INPUTS[:3], LABELS[:3])))
    assert int(totals.count) == 3 and np.isfinite(float(totals.loss))


def test_without_shuffling_the_order_is_the_subsets():
    order = make_order(np.array([4, 2, 7]), 5, vectorized=False, shuffle=False)
    assert np.asarray(order(SEED, np.int32(0))).tolist() == [4, 2, 7, 0, 0]
    assert np.asarray(order(SEED, np.int32(1))).tolist() == [4, 2, 7, 0, 0]
