"""What a comparison is made of: trials drawn, one program for all, baselines, intervals."""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison_support import make_features
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from pspinal_jax.comparison.answers import NEVER, as_record, find_temperature, read_records
from pspinal_jax.comparison.baselines import BASELINES, fit_baseline, votes
from pspinal_jax.comparison.best import folded
from pspinal_jax.comparison.report import describe_design, summarize
from pspinal_jax.comparison.search import standardisation
from pspinal_jax.comparison.settings import CompareConfig, Hparams, Trial, _steps, draw_trial, training_seed
from pspinal_jax.comparison.train import Examples, Part, Schedule, Task, Trainer, build_head, train_head
from pspinal_jax.layers.dropout import dropout_scale
from pspinal_jax.training.step import cross_entropy

SCHEDULE = Schedule(epochs=2, steps=2, batch_size=32, eval_batch_size=20)


def test_a_trial_is_a_function_of_seed_and_number_and_fills_its_ranges():
    config, scalings = CompareConfig(seed=3, label_smoothing=(0.01, 0.3)), ("each", "all")
    trials = [draw_trial(config, number, scalings) for number in range(64)]
    other = dataclasses.replace(config, seed=4)
    assert trials[5] == draw_trial(config, 5, scalings) != draw_trial(other, 5, scalings)
    for name in Hparams._fields:
        low, high = getattr(config, name)
        logs = np.log([getattr(trial.hparams, name) for trial in trials]) - np.log(low)
        shares = logs / np.log(high / low)
        assert shares.min() >= 0 and shares.max() <= 1
        # Of 64 points every eighth of the range has its 8, or nearly.
        assert np.abs(np.histogram(shares, 8, (0, 1))[0] - 8).max() <= 3
    assert 28 <= sum(trial.standardize == "all" for trial in trials) <= 36
    # Not tuning one leaves the others as they are.
    fixed = draw_trial(CompareConfig(seed=3), 5, scalings)
    assert fixed.hparams._replace(label_smoothing=0) == trials[5].hparams._replace(label_smoothing=0)
    seeds = {training_seed(0, kind, number) for kind in ("trial", "seed") for number in range(500)}
    assert len(seeds) == 1000 and min(seeds) >= 0 and max(seeds) < 2**31
    # Comparisons of earlier versions go on with the same trials.
    known = [training_seed(0, "trial", 0), training_seed(0, "seed", 3), training_seed(7, "trial", 12)]
    assert known == [1982462498, 1921341786, 1433290551]
    assert training_seed(CompareConfig(seed=2**31 - 1).seed, "trial", 0) > 0


def test_a_rate_in_an_array_gives_the_bits_of_the_number():
    key = jax.random.key(1)
    scale = jax.jit(lambda rate: dropout_scale(key, 0, rate, (64, 30), jnp.float32))
    for rate in np.float32([0.0, 0.02, 0.2, 0.25, 0.6, 0.999999]):
        expected = dropout_scale(key, 0, float(rate), (64, 30), jnp.float32)
        np.testing.assert_array_equal(scale(rate), expected)


@pytest.mark.parametrize("name", ["progressive", "spinal", "mlp", "dense"])
def test_a_head_takes_its_rate_as_an_array(name):
    head, _ = build_head(name, 6, 3, 4, 2, "published")
    inputs = jnp.asarray(make_features()["train"][0], jnp.float32)
    variables = head.init(jax.random.key(0), inputs, train=False)

    def logits(rate):
        dropped = head.clone(dropout_rate=rate)
        return dropped.apply(variables, inputs, train=True, rngs={"dropout": jax.random.key(1)})

    traced = jax.jit(logits)(np.float32(0.3))
    np.testing.assert_allclose(traced, logits(float(np.float32(0.3))), rtol=1e-5, atol=1e-5)
    assert not np.allclose(traced, logits(0.0))
    with pytest.raises(ValueError, match=r"dropout_rate must be a number or a floating-point array of no axes, got an"):
        head.clone(dropout_rate=jnp.ones(2))


def test_smoothing_in_an_array_gives_the_loss_of_the_number():
    logits, labels = jax.random.normal(jax.random.key(0), (5, 4)), jnp.arange(5) % 4
    for value in (0.0, 0.1):
        traced = jax.jit(cross_entropy)(logits, labels, np.float32(value))
        np.testing.assert_allclose(traced, cross_entropy(logits, labels, value), rtol=1e-6)


def make_tasks(head, count):
    inputs, labels = make_features()["train"]
    shift, scale = standardisation(inputs[:90], "each")
    rows = np.arange(120).astype(np.int32)
    part = Part(rows[:90], np.pad(rows[90:], (0, 10)), shift, scale)
    trials = [draw_trial(CompareConfig(), number, ("each",)) for number in range(count)]
    tasks = [Task(i, head, trial, training_seed(0, "trial", i), part) for i, trial in enumerate(trials)]
    return tasks, Examples(inputs.astype(np.float32), labels.astype(np.int32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["progressive", "mlp"])
def test_a_trial_alone_is_what_it_is_among_sixteen(name):
    """Up to the tolerance that `--seed-mode vmap` has in tests/runs/test_train.py."""
    tasks, examples = make_tasks(name, 16)
    head, _ = build_head(name, 6, 3, 8, 3, "published")
    together = Trainer({name: head}, SCHEDULE, max_slots=16, mode="vmap")
    batch = {task.key: outcome for task, outcome, _ in together.run(tasks, examples)}
    alone = Trainer({name: head}, SCHEDULE, max_slots=16, mode="loop", workers=2)
    for number in (0, 7, 15):
        ((_, single, _),) = alone.run([tasks[number]], examples)
        np.testing.assert_allclose(batch[number].loss, single.loss, rtol=1e-5)
        np.testing.assert_array_equal(batch[number].logits.argmax(-1), single.logits.argmax(-1))
        assert single.finite
    assert together.slots == 16
    assert alone.compilations == together.compilations == {name: 1}

    part = jax.tree.map(jnp.asarray, tasks[0].part)

    def parameters(hparams, seed):
        return train_head(head, SCHEDULE, hparams, seed, part, Examples(*map(jnp.asarray, examples)))[0].params

    hparams = Hparams(*np.asarray([task.trial.hparams for task in tasks], np.float32).T)
    seeds = np.asarray([task.seed for task in tasks], np.uint32)
    mapped = jax.jit(jax.vmap(parameters))(hparams, seeds)
    single = jax.jit(parameters)(jax.tree.map(lambda leaf: leaf[7], hparams), seeds[7])
    for ours, theirs in zip(jax.tree.leaves(mapped), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(ours[7], theirs, rtol=1e-4, atol=1e-4)


def test_more_trials_than_slots_go_in_groups(monkeypatch):
    tasks, examples = make_tasks("dense", 5)
    head, _ = build_head("dense", 6, 3, 4, 2, "published")
    whole = Trainer({"dense": head}, SCHEDULE, 5, "vmap")
    expected = {task.key: outcome for task, outcome, _ in whole.run(tasks, examples)}
    monkeypatch.setattr("pspinal_jax.comparison.train.MAX_SLOTS", 2)
    small = Trainer({"dense": head}, SCHEDULE, 5, "vmap")
    found = {task.key: outcome for task, outcome, _ in small.run(tasks, examples)}
    assert (whole.slots, small.slots, small.compilations) == (5, 2, {"dense": 1})
    assert sorted(found) == sorted(expected) == list(range(5))
    for number, outcome in found.items():
        np.testing.assert_array_equal(outcome.logits, expected[number].logits)
        np.testing.assert_allclose(outcome.loss, expected[number].loss, rtol=1e-5)


def test_all_trials_of_a_head_are_one_compilation():
    head, _ = build_head("spinal", 6, 3, 5, 2, "published")
    tasks, examples = make_tasks("spinal", 6)
    # Another trainer's program first, and with it the small ones that every process compiles once.
    assert len(list(Trainer({"spinal": head}, SCHEDULE, 1, "loop", workers=1).run(tasks[:1], examples))) == 1
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *args, **kwargs: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    runner = Trainer({"spinal": head}, SCHEDULE, max_slots=2, mode="loop", workers=2)
    assert len(list(runner.run(tasks[:3], examples))) == 3
    first = len(compiled)
    assert len(list(runner.run(tasks[3:], examples))) == 3
    assert first == len(compiled) == 1, compiled


def test_a_training_that_blows_up_says_so():
    head, _ = build_head("mlp", 6, 3, 8, 3, "published")
    tasks, examples = make_tasks("mlp", 1)
    wild = tasks[0]._replace(trial=Trial(tasks[0].trial.hparams._replace(learning_rate=1e30), "each"))
    ((_, outcome, _),) = Trainer({"mlp": head}, SCHEDULE, 1, "loop").run([wild], examples)
    assert not outcome.finite


def test_a_training_that_goes_well_says_so_with_the_loss_of_its_last_epoch():
    head, _ = build_head("mlp", 6, 3, 8, 3, "published")
    (task,), examples = make_tasks("mlp", 1)
    losses = []
    for epochs in (1, 2, 6):
        schedule = dataclasses.replace(SCHEDULE, epochs=epochs)
        ((_, outcome, _),) = Trainer({"mlp": head}, schedule, 1, "loop", workers=1).run([task], examples)
        assert outcome.finite and np.isfinite(outcome.loss)
        losses.append(float(outcome.loss))
    assert losses[2] < losses[1] < losses[0]


def test_workers_are_the_cores_or_as_many_as_asked():
    cores = len(os.sched_getaffinity(0))
    assert (
        Trainer({}, SCHEDULE, 1).workers == cores and Trainer({}, SCHEDULE, 1, workers=cores + 3).workers == cores + 3
    )


def test_trials_step_along_each_range_by_a_power_of_one_number():
    """Roberts's sequence: in each of d directions a power of 1 / g, where g ** (d + 1) = g + 1."""
    steps = _steps()
    np.testing.assert_allclose(steps[0] ** -(len(steps) + 1), 1 / steps[0] + 1)
    np.testing.assert_allclose(steps, steps[0] ** np.arange(1, len(steps) + 1))


@pytest.mark.parametrize(
    ("mean", "interval", "sentence"),
    [
        (0.02, [0.01, 0.03], r"Better than dense beyond the noise: mlp \(\+2.00, \+1.00 .. \+3.00\)\."),
        (-0.02, [-0.03, -0.01], r"Worse than dense .*: mlp \(-2.00, -3.00 .. -1.00\)\. No head is better than dense"),
        (0.01, [-0.01, 0.03], r"^No head is better than dense beyond the noise\. Best"),
    ],
)
def test_the_summary_says_what_is_better_than_dense(mean, interval, sentence):
    beyond = interval[0] > 0 or interval[1] < 0
    against = {"mean": mean, "interval_95": interval, "beyond_the_noise": beyond}
    rows = {name: {"test_metrics": {"accuracy": {"mean": 0.9}}} for name in ("mlp", "dense")}
    differences = {"to_dense": {"mlp": against}, "to_mlp": {"dense": against}}
    text = summarize(rows, differences, "mlp", describe_design(3, 1, 2))
    assert re.search(sentence, text) and "one split" not in text, text
    of_one = summarize(rows, differences, "mlp", describe_design(1, 3, 2))
    assert re.search(sentence, of_one) and of_one.endswith("which 3 splits or more show."), of_one


@pytest.mark.parametrize(
    ("splits", "seeds", "few"),
    [(1, 1, "1 seed of one split"), (1, 2, "2 seeds of one split"), (2, 5, "2 splits")],
)
def test_the_summary_claims_nothing_from_too_few_splits_or_seeds(splits, seeds, few):
    against = {"mean": 0.02, "interval_95": [0.01, 0.03], "beyond_the_noise": False}
    rows = {name: {"test_metrics": {"accuracy": {"mean": 0.9}}} for name in ("mlp", "dense")}
    differences = {"to_dense": {"mlp": against}, "to_mlp": {"dense": against}}
    text = summarize(rows, differences, "mlp", describe_design(splits, seeds, 2))
    assert f"Nothing is claimed of differences: {few} cannot tell luck from skill" in text
    assert "etter than" not in text and "noise" not in text


def test_the_summary_of_an_error_calls_less_of_it_better():
    against = {"mean": -0.02, "interval_95": [-0.03, -0.01], "beyond_the_noise": True}
    rows = {name: {"test_metrics": {"calibration_error": {"mean": 0.03}}} for name in ("mlp", "dense")}
    differences = {"to_dense": {"mlp": against}, "to_mlp": {"dense": against}}
    text = summarize(rows, differences, "mlp", describe_design(3, 1, 2, "calibration_error"))
    assert "Better than dense beyond the noise: mlp (-2.00, -3.00 .. -1.00)." in text
    assert "Best on validation is mlp, with 3.00 % calibration error on the test." in text


def test_heads_can_have_the_same_number_of_parameters():
    sizes = {name: build_head(name, 64, 10, 32, 4, "parameters")[1] for name in ("progressive", "spinal", "mlp")}
    assert max(sizes.values()) / min(sizes.values()) < 1.02
    published = {name: build_head(name, 64, 10, 32, 4, "published")[1] for name in sizes}
    assert published["progressive"] == sizes["progressive"] > 1.5 * published["spinal"]


def elected(labels, num_classes):
    """By the definition: the most votes, then the smallest sum of ranks, then the first class."""
    found = []
    for row in labels:
        ranks = [np.flatnonzero(row == label) for label in range(num_classes)]
        found.append(max(range(num_classes), key=lambda label: (len(ranks[label]), -ranks[label].sum(), -label)))
    return found


def test_votes_count_before_nearness_and_nearness_before_the_number_of_the_class():
    cases = {(0, 0, 1, 1, 1): 1, (2, 1, 2, 1, 0): 2, (1, 2, 1, 2, 0): 1, (2, 2, 1, 1): 2, (2, 1, 1, 2): 1, (2, 1): 2}
    for row, winner in cases.items():
        assert votes(np.array([row]), 3).argmax(1).tolist() == elected([np.array(row)], 3) == [winner], row
    rng = np.random.default_rng(0)
    for k in (1, 4, 9, 50):
        rows = rng.integers(0, 3, (200, k))
        assert votes(rows, 3).argmax(1).tolist() == elected(rows, 3)


def fitted(name, settings=None, splits=None, num_classes=3):
    """(settings, scores of the test examples under each, linear maps)."""
    train, (others, _) = (splits or make_features()).values()
    settings = settings or BASELINES[name]
    found = list(fit_baseline(name, settings, train, others, num_classes))
    return settings, [each.scores for each in found], [each.linear for each in found]


def test_neighbours_and_ridge_do_what_they_are_called():
    (inputs, labels), (others, _) = make_features().values()
    settings, scores, _ = fitted("knn")
    assert len(settings) == len(scores) == 12
    assert [setting["k"] for setting in settings[:6]] == [1, 3, 5, 10, 20, 50]
    for setting, ours in zip(settings, scores, strict=True):
        unit = setting["metric"] == "cosine"
        near, far = (each / np.linalg.norm(each, axis=1, keepdims=True) if unit else each for each in (others, inputs))
        order = ((near[:, None] - far[None]) ** 2).sum(-1).argsort(1)
        np.testing.assert_array_equal(ours.argmax(1), elected(labels[order[:, : setting["k"]]], 3))

    centred, targets = inputs - inputs.mean(0), 2 * np.eye(3)[labels] - 1
    weights = np.linalg.solve(centred.T @ centred + 10 * np.eye(6), centred.T @ (targets - targets.mean(0)))
    expected = (others - inputs.mean(0)) @ weights + targets.mean(0)
    _, (ours,), _ = fitted("ridge", [{"penalty": 10.0}])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    for most in (2, 3):  # two classes have one target in scikit-learn
        some, settings = labels < most, BASELINES["ridge"]
        splits = {"train": (inputs[some], labels[some]), "test": (others, labels[:60])}
        for setting, ours in zip(settings, fitted("ridge", None, splits, most)[1], strict=True):
            theirs = RidgeClassifier(alpha=setting["penalty"], solver="svd").fit(*splits["train"])
            np.testing.assert_array_equal(ours.argmax(1), theirs.predict(others))


def scaled(splits):
    shift, scale = standardisation(splits["train"][0], "each")
    return {name: (((inputs - shift) * scale).astype(np.float32), labels) for name, (inputs, labels) in splits.items()}


@pytest.mark.parametrize(("num_classes", "most"), [(2, 2048), (3, 2048), (3, 1)])
def test_logistic_regression_ends_within_1e_5_of_scikit_learns_loss(num_classes, most, monkeypatch):
    """With or without principal axes."""
    monkeypatch.setattr("pspinal_jax.comparison.baselines.MAX_AXES", most)
    splits = scaled(make_features(num_train=300))
    splits = {
        name: (inputs[labels < num_classes], labels[labels < num_classes]) for name, (inputs, labels) in splits.items()
    }
    inputs, labels = splits["train"]
    settings, _, maps = fitted("logistic", splits=splits, num_classes=num_classes)
    assert len(settings) == 45 and [settings[i]["C"] for i in (0, -1)] == [1e-6, 1e5]

    def loss(scores, penalty, c):
        each = np.logaddexp.reduce(scores, 1) - scores[np.arange(len(labels)), labels]
        return each.mean() + penalty / (2 * c * len(labels))

    for setting, linear in list(zip(settings, maps, strict=True))[::4]:
        c = setting["C"]
        theirs = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(inputs.astype(float), labels)
        expected = theirs.decision_function(inputs)
        expected = np.stack([0 * expected, expected], 1) if num_classes == 2 else expected
        ours = inputs.astype(float) @ linear.weights + linear.bias
        penalty = (linear.weights**2).sum() * (2 if num_classes == 2 else 1)
        assert abs(loss(ours, penalty, c) - loss(expected, (theirs.coef_**2).sum(), c)) < 1e-5


@pytest.mark.parametrize("num_train", [90, 12])
def test_linear_discriminants_are_scikit_learns(num_train):
    """Also of fewer examples than features."""
    rng = np.random.default_rng(0)
    labels = np.arange(num_train) % 3
    draw = lambda labels: (np.eye(3, 30)[labels] + rng.normal(0, 0.7, (len(labels), 30))).astype(np.float32)  # noqa: E731
    splits = {"train": (draw(labels), labels), "test": (draw(np.arange(40) % 3), np.arange(40) % 3)}
    settings, scores, _ = fitted("lda", splits=splits)
    for setting, ours in zip(settings, scores, strict=True):
        theirs = LinearDiscriminantAnalysis(solver="lsqr", **setting).fit(splits["train"][0].astype(float), labels)
        expected = theirs.decision_function(splits["test"][0])
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_nearest_mean_goes_by_distance_or_by_angle():
    (inputs, labels), (others, _) = make_features().values()
    means = np.stack([inputs[labels == label].mean(0) for label in range(3)])
    _, (euclidean, cosine), _ = fitted("nearest_mean")
    np.testing.assert_array_equal(euclidean.argmax(1), ((others[:, None] - means) ** 2).sum(-1).argmin(1))
    angles = others @ means.T / np.linalg.norm(means, axis=1)
    np.testing.assert_array_equal(cosine.argmax(1), angles.argmax(1))


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_class_without_an_example_is_never_predicted(name):
    _, scores, _ = fitted(name, BASELINES[name][20:22] if name == "logistic" else None, num_classes=5)
    for each in scores:
        assert each.shape == (60, 5) and each[:, 3:].max() < each[:, :3].max(1).min() - 100


@pytest.mark.parametrize("name", ["progressive", "spinal", "mlp", "dense"])
def test_scaling_and_temperature_fold_into_a_head(name):
    head, _ = build_head(name, 7, 3, 5, 4, "published")
    rng = np.random.default_rng(0)
    inputs = rng.normal(100, [1, 10, 0, 3, 4, 5, 6], (50, 7)).astype(np.float32)
    shift, scale = standardisation(inputs, "each")
    params = head.init(jax.random.key(0), inputs, train=False)["params"]
    expected = head.apply({"params": params}, (inputs - shift) * scale, train=False) / 2.5
    found = folded(name, params, shift, scale, 2.5)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(head.apply({"params": found}, inputs, train=False), expected, rtol=1e-3, atol=2e-4)


def test_a_temperature_makes_scores_as_sure_as_they_are_right():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, (4000, 5))
    labels = (scores + rng.gumbel(size=scores.shape)).argmax(1)  # drawn by softmax of the scores
    assert find_temperature(scores, labels) == pytest.approx(1, rel=0.05)
    assert find_temperature(7 * scores, labels) == pytest.approx(7, rel=0.05)
    # All right is no reason to be certain, a class never seen none to be less sure, and what diverged says nothing.
    certain = np.eye(3)[labels % 3]
    assert 0.05 < find_temperature(certain[:50], labels[:50] % 3) < 0.5
    wider = np.pad(scores, ((0, 0), (0, 1)), constant_values=NEVER)
    assert find_temperature(wider, labels) == pytest.approx(1, rel=0.05)
    lost = as_record(
        np.full((4, 3), np.nan, np.float32), find_temperature(np.full((9, 3), np.nan), labels[:9] % 3), labels[:4] % 3
    )
    assert read_records([[lost]], labels[None, :4] % 3).confidence.tolist() == [[[pytest.approx(1 / 3, rel=1e-3)] * 4]]


def test_standardisation_sees_the_training_rows_alone():
    inputs = np.random.default_rng(0).normal(3, [1, 10, 0], (50, 3)).astype(np.float32)
    shift, scale = standardisation(inputs, "each")
    np.testing.assert_allclose(((inputs - shift) * scale).std(0), [1, 1, 0], rtol=1e-5, atol=1e-6)
    shift, scale = standardisation(inputs, "all")
    assert len(set(scale.tolist())) == 1 and ((inputs - shift) * scale).std() == pytest.approx(1, rel=1e-5)
    pixels = np.full((4, 3), 255, np.uint8)
    shift, scale = standardisation(pixels, "none")
    np.testing.assert_allclose((pixels - shift) * scale, 1, rtol=1e-6)
