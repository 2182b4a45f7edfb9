"""Class weights, sampler, warm-up, clipping, averages, mixed labels, the backbone's rate: against NumPy and optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps_support import make_programs

from pspinal_jax.augment import mix
from pspinal_jax.augment.mixing import Mixed
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.models import Classifier
from pspinal_jax.runs.build import balanced_weights
from pspinal_jax.training import keys
from pspinal_jax.training.keys import make_order
from pspinal_jax.training.optimizers import Schedule, learning_rates, make_optimizer
from pspinal_jax.training.state import head_layouts
from pspinal_jax.training.step import EpochPlan, target_losses

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(48, 6)).astype(np.float32)
LABELS = np.repeat([0, 1, 2], [32, 12, 4]).astype(np.int32)
WEIGHTS = balanced_weights(LABELS, 3)
SEED = np.uint32(5)


def test_balanced_weights_are_n_over_k_n_c():
    np.testing.assert_allclose(WEIGHTS, [48 / (3 * 32), 48 / (3 * 12), 48 / (3 * 4)])
    assert np.mean(np.asarray(WEIGHTS)[LABELS]) == pytest.approx(1)
    # A class that does not occur is none of the K.
    np.testing.assert_allclose(balanced_weights(LABELS, 4)[:3], WEIGHTS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 4.0)])
def test_the_loss_of_mixed_labels_is_that_of_soft_ones(smoothing, weights):
    logits = RNG.normal(size=(9, 3)).astype(np.float32)
    labels, others = RNG.integers(0, 3, (2, 9))
    lam = RNG.random(9).astype(np.float32)
    weighted = np.ones(3) if weights is None else np.asarray(weights)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    soft = [(1 - smoothing) * np.eye(3)[each] + smoothing / 3 for each in (labels, others)]
    each = [-weighted[index] * (target * log_p).sum(-1) for index, target in zip((labels, others), soft, strict=True)]
    expected = lam * each[0] + (1 - lam) * each[1]
    found = target_losses(logits, Mixed(labels, others, lam), smoothing, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(target_losses(logits, labels, smoothing, weights), each[0], rtol=1e-5)


def test_a_balanced_epoch_draws_every_class_evenly_and_all_of_it_first():
    subset = np.arange(1, 48)  # 31 of class 0, 12, 4
    order = make_order(subset, 50, vectorized=False, balanced=LABELS)
    drawn = [np.asarray(order(SEED, np.int32(epoch))) for epoch in range(3)]
    for each in drawn:
        assert each.shape == (50,) and set(each[:47]) <= set(subset) and not each[47:].any()
        counts = np.bincount(LABELS[each[:47]], minlength=3)
        assert counts.sum() == 47 and set(counts) == {15, 16}
        for label, size in enumerate((31, 12, 4)):
            times = np.bincount(each[:47][LABELS[each[:47]] == label], minlength=48)
            times = times[times > 0] if label == 0 else times[subset[LABELS[subset] == label]]
            assert times.max() - times.min() <= 1 and times.max() == -(-counts[label] // size)
    assert (drawn[0] != drawn[1]).any() and set(drawn[0][:47]) != set(drawn[1][:47])
    # Classes do not come in blocks, and which of them is drawn once more differs.
    assert np.diff(LABELS[drawn[0][:47]]).astype(bool).sum() > 15
    more = {int(np.argmin(np.bincount(LABELS[np.asarray(order(SEED, np.int32(e)))[:47]]))) for e in range(12)}
    assert len(more) > 1
    both = make_order(subset, 50, vectorized=True, balanced=LABELS)(np.array([5, 6], np.uint32), np.int32(1))
    np.testing.assert_array_equal(both[0], drawn[1])
    assert (np.asarray(both[1]) != drawn[1]).any()


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_a_warm_up_is_followed_by_the_schedule_of_the_rest(name):
    """1.5 epochs of 20 steps, of 4."""
    schedule = Schedule(name, 0.5, decay_epochs=1, warmup_epochs=1.5)
    rates = np.concatenate([learning_rates(schedule, epoch, 20, 4) for epoch in range(4)])
    np.testing.assert_allclose(rates[:30], 0.02 + (0.5 - 0.02) * np.arange(30) / 30, rtol=1e-5)
    steps = np.arange(50)
    rest = {
        "constant": np.full(50, 0.5),
        "cosine": 0.25 * (1 + np.cos(np.pi * steps / 50)),
        "step": 0.5 * 0.1 ** (steps // 20),
    }[name]
    np.testing.assert_allclose(rates[30:], rest, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_a_warm_up_may_take_every_step(name):
    """1.97 of 2 epochs are rounded to all 20 steps."""
    schedule = Schedule(name, 0.5, warmup_epochs=1.97)
    rates = np.concatenate([learning_rates(schedule, epoch, 10, 2) for epoch in range(2)])
    np.testing.assert_allclose(rates, 0.02 + (0.5 - 0.02) * np.arange(20) / 20, rtol=1e-5)


PARAMS = {"backbone": {"kernel": jnp.full((3, 2), 2.0)}, "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}


def test_clipping_and_the_backbones_rate_are_optaxs():
    found = make_optimizer("adamw", weight_decay=0.3, gradient_clip=0.7, backbone_rate=0.1)
    label = {"backbone": "slow", "head": "fast"}

    def kernels(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", tree)

    rates = {"slow": 0.02, "fast": 0.2}
    parts = {name: optax.adamw(rate, weight_decay=0.3, mask=kernels) for name, rate in rates.items()}
    reference = optax.chain(optax.clip_by_global_norm(0.7), optax.partition(parts, label))
    state, reference_state, params, moved = found.init(PARAMS), reference.init(PARAMS), PARAMS, PARAMS
    for step in range(3):
        gradients = jax.tree.map(lambda leaf, s=step: 0.05 * leaf + s, PARAMS)  # the first is not clipped
        direction, state = found.update(gradients, state, moved)
        moved = jax.tree.map(lambda p, d: p - 0.2 * d, moved, direction)
        updates, reference_state = reference.update(gradients, reference_state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(moved, params, rtol=1e-5)


def programs(**options):
    head = ProgressiveSpinalHead(num_classes=3, layer_width=5, num_layers=2, norm="batch", dropout_rate=0.1)
    optimizer = make_optimizer("sgd", momentum=0.9, gradient_clip=options.pop("gradient_clip", 0.0))
    return make_programs(Classifier(head=head), optimizer, (6,), np.float32, 8, 16, **options)


def states(run, steps=5):
    """The states after each step."""
    order = make_order(np.arange(48), 48, vectorized=False, balanced=LABELS)(SEED, np.int32(0))
    plan = EpochPlan(order, np.full(6, 0.1, np.float32))
    state, totals = run.init(SEED), run.zero_totals(SEED)
    found = [jax.tree.map(np.array, state)]
    for step in range(steps):
        state, totals = run.chunk(state, totals, SEED, plan, np.int32(step), np.int32(1), (INPUTS, LABELS))
        found.append(jax.tree.map(np.array, state))
    return found, order, totals


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fused", "packed"])
def test_the_moving_average_is_that_of_params_and_running_statistics(layout):
    found, *_ = states(programs(ema_decay=0.3, head_layouts=head_layouts(layout)))
    expected = {"params": found[0].params, "batch_stats": found[0].batch_stats}
    chex.assert_trees_all_equal(found[0].ema, expected)
    for step, state in enumerate(found[1:], 1):
        decay = min(0.3, (1 + step) / (10 + step))
        new = {"params": state.params, "batch_stats": state.batch_stats}
        expected = jax.tree.map(lambda old, now, d=decay: d * old + (1 - d) * now, expected, new)
        chex.assert_trees_all_close(state.ema, expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal(state.variables, state.ema)
    assert decay == 0.3 and not np.allclose(
        expected["params"]["head"]["output"]["kernel"], new["params"]["head"]["output"]["kernel"]
    )
    # The training itself is the same.
    plain, *_ = states(programs(head_layouts=head_layouts(layout)))
    chex.assert_trees_all_equal(plain[-1].params, found[-1].params)
    assert plain[-1].ema == {}


def test_what_is_frozen_has_no_average():
    found, *_ = states(programs(ema_decay=0.3, frozen=("head",)), steps=1)
    assert found[0].ema == {"params": {}, "batch_stats": {}}
    chex.assert_trees_all_equal(found[-1].variables["params"], found[0].params)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_with_all_of_it_is_the_plain_one_written_out(micro_batches):
    """Shifted and mixed batch, weighted loss, clipped gradient, momentum; without dropout and batch norm."""
    head = ProgressiveSpinalHead(num_classes=3, layer_width=5, num_layers=2, dropout_rate=0.0)

    def shift(key, inputs):
        return inputs + jax.random.normal(key, inputs.shape)

    options = {"mix": lambda key, x, y: mix(key, x, y, mixup=0.5), "class_weights": WEIGHTS, "label_smoothing": 0.1}
    optimizer = make_optimizer("sgd", momentum=0.9, gradient_clip=0.05)
    options |= {"micro_batches": micro_batches, "augment": shift}
    run = make_programs(Classifier(head=head), optimizer, (6,), np.float32, 8, 16, **options)
    found, order, totals = states(run, steps=3)
    tx = optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.1, momentum=0.9))
    params = found[0].params
    opt_state = tx.init(params)
    for step in range(3):
        rows = np.asarray(order)[8 * step : 8 * step + 8]
        key = keys.step_key(SEED, step)
        shifted = shift(keys.augment_key(key), INPUTS[rows])
        inputs, targets = mix(keys.mix_key(key), shifted, LABELS[rows], mixup=0.5)
        lam = np.asarray(targets.lam)[:, None]
        weighted = [lam * np.eye(3)[LABELS[rows]], (1 - lam) * np.eye(3)[np.asarray(targets.others)]]
        soft = sum(
            (0.9 * each + each.sum(1, keepdims=True) * 0.1 / 3) * (each @ WEIGHTS / each.sum(1))[:, None]
            for each in weighted
        )

        def loss(params, inputs=inputs, soft=soft):
            logits = Classifier(head=head).apply({"params": params}, inputs, train=False)
            return -(soft * jax.nn.log_softmax(logits)).sum(-1).mean()

        gradients = jax.grad(loss)(params)
        assert sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradients)) > 0.05**2
        updates, opt_state = tx.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(found[step + 1].params, params, rtol=1e-4, atol=1e-6)
    assert int(totals.count) == 24 and 0 <= int(totals.metrics["correct"]) <= 24
