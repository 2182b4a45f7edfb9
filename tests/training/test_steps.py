from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps_support import make_programs

from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.models import Classifier
from pspinal_jax.training import keys
from pspinal_jax.training.keys import make_order
from pspinal_jax.training.loop import CHUNK_SECONDS, Trainer
from pspinal_jax.training.optimizers import Schedule, learning_rates, make_optimizer
from pspinal_jax.training.programs import padded_split
from pspinal_jax.training.step import EpochPlan, cross_entropy

NUM_EXAMPLES = 50
RNG = np.random.default_rng(0)
INPUTS = RNG.integers(0, 256, (NUM_EXAMPLES, 3, 3, 1)).astype(np.uint8)
LABELS = RNG.integers(0, 4, NUM_EXAMPLES).astype(np.int32)
DATA = (INPUTS, LABELS)
SEED = np.uint32(3)


def model() -> Classifier:
    head = ProgressiveSpinalHead(num_classes=4, layer_width=5, norm="batch", layer_dropout_rate=0.1)
    return Classifier(head=head, mean=0.3, std=0.5)


def programs(batch_size=8, vectorized=False, optimizer=None, label_smoothing=0.0, eval_batch_size=16, block=1):
    return make_programs(
        model(),
        optimizer or make_optimizer(),
        (3, 3, 1),
        np.uint8,
        batch_size,
        eval_batch_size,
        label_smoothing,
        vectorized=vectorized,
        block=block,
    )


def plan(seed=SEED, epoch=0, rate=0.05, steps=6):
    order = make_order(np.arange(NUM_EXAMPLES), NUM_EXAMPLES, vectorized=False)
    return EpochPlan(order(seed, np.int32(epoch)), np.full(steps, rate, np.float32))


def train(run, ends, seed=SEED):
    """State and totals after 6 steps, in chunks that end at `ends`."""
    state, totals = run.init(seed), run.zero_totals(seed)
    for first, last in zip([0, *ends], [*ends, 6], strict=True):
        state, totals = run.chunk(state, totals, seed, plan(seed), np.int32(first), np.int32(last - first), DATA)
    return state, totals


def test_results_do_not_depend_on_the_chunk_length():
    run = programs()
    whole = train(run, [])
    chex.assert_trees_all_equal(whole, train(run, [1, 2, 3, 4, 5]))
    chex.assert_trees_all_equal(whole, train(run, [4]))
    assert int(whole[0].step) == 6 and int(whole[1].count) == 48


@pytest.mark.parametrize("vectorized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_blocks_of_steps_have_a_known_length_and_change_no_bit(vectorized):
    seed = np.asarray([3, 4], np.uint32) if vectorized else SEED
    order = make_order(np.arange(NUM_EXAMPLES), NUM_EXAMPLES, vectorized)(seed, np.int32(0))
    epoch = EpochPlan(order, np.full((2, 6) if vectorized else 6, 0.05, np.float32))
    run = programs(vectorized=vectorized, block=4)
    found = {}
    for ends in ((), (1, 2), (4,), (5,)):
        state, totals = run.init(seed), run.zero_totals(seed)
        for first, end in zip([0, *ends], [*ends, 6], strict=True):
            state, totals = run.chunk(state, totals, seed, epoch, np.int32(first), np.int32(end - first), DATA)
        found[ends] = state, totals
    for each in found.values():
        chex.assert_trees_all_equal(found[()], each)
    assert np.all(found[()][0].step == 6) and np.all(found[()][1].count == 48)
    if not vectorized:  # the other program is another one, whose last bits may differ
        chex.assert_trees_all_close(found[()], train(programs(), []), atol=1e-6)
    arguments = run.init(seed), run.zero_totals(seed), seed, epoch, np.int32(0), np.int32(6), DATA
    assert '"known_trip_count":{"n":"4"}' in run.chunk.lower(*arguments).compile().as_text()


def test_a_chunk_takes_as_long_as_two_looks_at_the_clock_lie_apart():
    setup = SimpleNamespace(examples=SimpleNamespace(first_chunk=8))
    idle = {"setup": setup, "inspection": SimpleNamespace(due=False)}
    unknown, known, slow = (SimpleNamespace(**idle, _steps_per_second=rate) for rate in (None, 50.0, 0.01))
    assert [Trainer._chunk_steps(each, 1000) for each in (unknown, known, slow)] == [8, int(50 * CHUNK_SECONDS), 1]
    assert [Trainer._chunk_steps(each, 5) for each in (unknown, known, slow)] == [5, 5, 1]


def test_evaluation_in_blocks_knows_its_batches_and_counts_every_example_once():
    plain, blocks = programs(), programs(block=4)
    arguments = plain.init(SEED).variables, padded_split(DATA, 16), np.int32(NUM_EXAMPLES)
    chex.assert_trees_all_equal(plain.evaluate(*arguments), blocks.evaluate(*arguments))
    assert '"known_trip_count":{"n":"4"}' in blocks.evaluate.lower(*arguments).compile().as_text()


def test_a_chunk_is_the_plain_loop_over_steps():
    """The compiled loop against the same mathematics written out, with optax's own SGD."""
    net, tx = model(), optax.sgd(0.05, momentum=0.9)
    state = programs().init(SEED)
    params, stats, opt_state = state.params, state.batch_stats, tx.init(state.params)
    order = np.asarray(plan().order)

    @jax.jit
    def update(params, stats, opt_state, rows, step):
        def loss(params):
            logits, new = net.apply(
                {"params": params, "batch_stats": stats},
                jnp.asarray(INPUTS)[rows],
                train=True,
                rngs={"dropout": keys.step_key(SEED, step)},
                mutable=["batch_stats"],
            )
            labels = jnp.asarray(LABELS)[rows]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

        gradients, stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    for step in range(6):
        params, stats, opt_state = update(params, stats, opt_state, order[8 * step : 8 * step + 8], step)
    state, _ = train(programs(), [])
    chex.assert_trees_all_close(state.params, params, atol=2e-6)
    chex.assert_trees_all_close(state.batch_stats, stats, atol=2e-6)


def test_the_tail_is_trained_on_its_own():
    run = programs()
    state, totals = train(run, [])
    state, totals = run.tail(2)(state, totals, SEED, plan(steps=7), np.int32(6), np.int32(1), DATA)
    assert int(totals.count) == NUM_EXAMPLES and int(state.step) == 7


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own():
    subset = np.array([3, 5, 7, 11, 13])
    order = make_order(subset, 8, vectorized=False)
    first, second = (np.asarray(order(SEED, np.int32(epoch))) for epoch in (0, 1))
    assert sorted(first[:5]) == sorted(second[:5]) == subset.tolist()
    assert len(first) == 8 and first[:5].tolist() != second[:5].tolist()
    np.testing.assert_array_equal(first, order(SEED, np.int32(0)))
    assert np.asarray(order(np.uint32(4), np.int32(0))).tolist() != first.tolist()


@pytest.mark.slow
def test_vectorized_seeds_equal_single_ones():
    seeds = np.array([3, 9], np.uint32)
    run = programs(vectorized=True)
    orders = make_order(np.arange(NUM_EXAMPLES), NUM_EXAMPLES, vectorized=True)(seeds, np.int32(0))
    both = run.chunk(
        run.init(seeds),
        run.zero_totals(seeds),
        seeds,
        EpochPlan(orders, np.full((2, 6), 0.05, np.float32)),
        np.int32(0),
        np.int32(6),
        DATA,
    )
    for index, seed in enumerate(seeds):
        single = train(programs(), [], seed)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=index: leaf[i], both), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 50, 64])
def test_evaluation_counts_every_example_once(batch_size):
    run = programs(eval_batch_size=batch_size)
    state = run.init(SEED)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    split = padded_split(DATA, batch_size)
    result = run.evaluate(variables, split, np.int32(NUM_EXAMPLES))
    logits = model().apply(variables, jnp.asarray(INPUTS), train=False)
    assert int(result.metrics["correct"]) == int((logits.argmax(-1) == LABELS).sum())
    np.testing.assert_array_equal(result.predictions[:NUM_EXAMPLES], logits.argmax(-1))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    np.testing.assert_allclose(result.loss, losses.sum(), rtol=1e-5)


def test_evaluation_of_nothing_is_nothing():
    run = programs()
    state = run.init(SEED)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    result = run.evaluate(variables, padded_split(DATA, 16), np.int32(0))
    assert float(result.loss) == 0 and int(result.metrics["correct"]) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_label_smoothing_is_the_cross_entropy_with_smoothed_targets(smoothing):
    logits = jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS[:9], 4), smoothing)
    expected = optax.softmax_cross_entropy(logits, targets)
    np.testing.assert_allclose(cross_entropy(logits, LABELS[:9], smoothing), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (make_optimizer("sgd", momentum=0.5), optax.sgd(0.1, momentum=0.5)),
        (make_optimizer("sgd", momentum=0.9, nesterov=True), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        (make_optimizer("sgd", momentum=0.0), optax.sgd(0.1)),
        (make_optimizer("adam"), optax.adam(0.1)),
        (
            make_optimizer("adamw", weight_decay=0.2),
            optax.adamw(0.1, weight_decay=0.2, mask={"bias": False, "kernel": True}),
        ),
    ],
)
def test_optimizers_are_optaxs(optimizer, reference):
    rate = 0.1
    params = moved = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    state, reference_state = optimizer.init(params), reference.init(params)
    for step in range(3):
        gradients = jax.tree.map(lambda leaf, s=step: leaf * 0.3 + s, params)
        direction, state = optimizer.update(gradients, state, moved)
        moved = jax.tree.map(lambda p, d: p - rate * d, moved, direction)
        updates, reference_state = reference.update(gradients, reference_state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(moved, params, rtol=1e-6)


def test_schedules():
    def rates(name, **fields):
        return learning_rates(Schedule(name, 0.5, **fields), 0, 100, 1)

    np.testing.assert_allclose(rates("constant"), 0.5)
    cosine = rates("cosine")
    np.testing.assert_allclose(cosine[[0, 50]], [0.5, 0.25], atol=1e-7)
    assert 0 < cosine[99] < 0.001
    one_cycle = rates("one_cycle", warmup_fraction=0.3)
    assert one_cycle.argmax() == 30 and one_cycle[30] == np.float32(0.5)
    np.testing.assert_allclose(one_cycle[0], 0.02, rtol=1e-5)
    assert 0 < one_cycle[99] < 0.001
    schedule = Schedule("one_cycle")
    np.testing.assert_array_equal(learning_rates(schedule, 2, 20, 5), learning_rates(schedule, 0, 100, 1)[40:60])
    schedule = Schedule("step", 0.5, decay_epochs=3)
    by_epoch = np.stack([learning_rates(schedule, epoch, 13, 8) for epoch in range(8)])
    np.testing.assert_allclose(by_epoch, np.repeat([[0.5], [0.05], [0.005]], [3, 3, 2], 0) + np.zeros(13), rtol=1e-6)


def test_batches_are_spread_over_the_devices():
    """On several devices the compiled step must reduce over them; equality across devices is in test_devices."""
    run = programs()
    assert run.mesh.axis_names == ("data", "fsdp", "model") and run.mesh.shape["data"] == jax.device_count()
