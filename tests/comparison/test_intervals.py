"""Intervals of paired differences: as wide as few splits, seeds and trials ask for."""

import numpy as np
import pytest
from scipy.stats import norm, t

from pspinal_jax.comparison.intervals import TUNING_DEGREES, _moderated, paired_intervals, winners_of_draws


def test_one_split_varies_by_its_seeds_and_by_the_examples_that_they_share():
    values = np.random.default_rng(0).random((2, 1, 3, 40))
    found = paired_intervals(values, np.arange(40)[None])
    difference = values[0, 0] - values[1, 0]  # [S, T]
    of_seeds = difference.mean(1).var(ddof=1) / 3
    pairs = [np.cov(difference[i], difference[j])[0, 1] for i in range(3) for j in range(i)]
    of_examples = max(np.mean(pairs) / 40, 0)
    np.testing.assert_allclose(found.standard_error[0, 1] ** 2, of_seeds + of_examples)
    wide = t.isf(0.025, 2) ** 2 * of_seeds + norm.isf(0.025) ** 2 * of_examples
    np.testing.assert_allclose(found.half_width[0, 1] ** 2, wide)
    np.testing.assert_allclose(found.mean, [[0, difference.mean()], [-difference.mean(), 0]], atol=1e-15)
    assert found.units == 3


def test_several_splits_vary_by_their_means_and_by_the_examples_that_they_share():
    values = np.random.default_rng(1).random((2, 4, 2, 40))
    apart = np.arange(160).reshape(4, 40)
    difference = (values[0] - values[1]).mean((1, 2))  # [K]
    of_splits = difference.var(ddof=1) / 4
    found = paired_intervals(values, apart)
    np.testing.assert_allclose(found.half_width[0, 1], t.isf(0.025, 3) * np.sqrt(of_splits))
    assert found.units == 4
    # The same examples in every split: their luck does not average out.
    values = np.broadcast_to(np.random.default_rng(2).random((2, 1, 1, 40)), (2, 4, 2, 40))
    together = paired_intervals(values, np.broadcast_to(np.arange(40), (4, 40)))
    of_examples = (values[0, 0, 0] - values[1, 0, 0]).var(ddof=1) / 40
    np.testing.assert_allclose(together.standard_error[0, 1] ** 2, of_examples)
    half = paired_intervals(values, np.arange(40) + 20 * np.arange(4)[:, None])
    shares = [0.5, 0, 0.5, 0, 0, 0.5]
    np.testing.assert_allclose(half.standard_error[0, 1] ** 2, of_examples * np.mean(shares))


def test_methods_that_agree_on_a_small_test_are_not_taken_for_equal():
    right = np.ones((2, 1, 3, 50), bool)
    assert paired_intervals(right, np.arange(50)[None]).half_width[0, 1] == 0
    found = paired_intervals(right, np.arange(50)[None], rounding=1 / 50)
    np.testing.assert_allclose(found.half_width[0, 1], norm.isf(0.025) / 50)


def test_the_luck_of_the_tuning_widens():
    values, tests = np.random.default_rng(0).random((3, 1, 5, 40)), np.arange(40)[None]
    tuned = np.random.default_rng(1).random((3, 1, 100))
    tuned[1] = tuned[0]  # the same trials
    without, found = paired_intervals(values, tests), paired_intervals(values, tests, tuned)
    added = found.half_width**2 - without.half_width**2
    luck = tuned[0].var(ddof=1) + tuned[2].var(ddof=1)
    np.testing.assert_allclose(added[0, 2], t.isf(0.025 / 3, TUNING_DEGREES) ** 2 * luck)
    np.testing.assert_allclose(added[0, 1], 0, atol=1e-12)
    tuned[2] = 0.5  # none
    added = paired_intervals(values, tests, tuned).half_width ** 2 - without.half_width**2
    np.testing.assert_allclose(added[0, 2], t.isf(0.025 / 3, TUNING_DEGREES) ** 2 * tuned[0].var(ddof=1))
    # Of several splits it is what they have in common; the rest is between them.
    values, tests = np.repeat(values, 3, axis=1), np.arange(120).reshape(3, 40)
    common = np.random.default_rng(2).normal(size=(3, 1, 4000))
    found = paired_intervals(values, tests, common + np.random.default_rng(3).normal(size=(3, 3, 4000)))
    without = paired_intervals(values, tests)
    added = (found.half_width**2 - without.half_width**2)[0, 2]
    assert added == pytest.approx(t.isf(0.025 / 3, 9) ** 2 * 2, rel=0.15)  # three that are alike have 9 degrees


def test_variances_of_few_units_learn_from_each_other():
    alike = np.full((5, 5), 2.0) - 2 * np.eye(5)
    moderated, degrees = _moderated(alike, 2, 3)
    assert degrees == 4 * 2  # as of all five pooled
    assert (moderated[alike > 0] >= 2).all()
    # Variances so unlike teach nothing, and what is noisier than the others keeps its own.
    unlike = 10.0 ** np.add.outer(np.arange(5) * 3, np.arange(5) * 3) * (1 - np.eye(5))
    assert 2 < _moderated(unlike, 2, 3)[1] < 3
    one = alike.copy()
    one[0, 1:] = one[1:, 0] = 50
    moderated, degrees = _moderated(one, 2, 3)
    assert (moderated[0, 1:] >= 50).all() and 2 < degrees < 8
    lucks, degrees = _moderated(np.array([1.0, 1.1, 0.9, 0.0]), 4, 2)
    assert degrees == 12 and (lucks[:3] >= [1, 1.1, 0.9]).all() and lucks[3] == 0
    # What does not vary at all stays so, and two methods have nobody to learn from.
    still = alike.copy()
    still[0, 1] = still[1, 0] = 0
    assert _moderated(still, 2, 3)[0][0, 1] == 0
    assert _moderated(alike[:2, :2], 2, 0)[1] == 2


def test_half_of_the_trials_elect_a_winner_the_same_half_for_all():
    scores = np.random.default_rng(0).random((2, 3, 8))
    order = (-scores).argsort(-1)
    found = winners_of_draws(scores[:, :1], order[:, :1], 4000)
    for method in range(2):
        ranked = np.sort(scores[method, 0])[::-1]
        share = [(found[method] == score).mean() for score in ranked]
        # The best is among four of eight in half of the draws, the second without it in 2/7 of them, ..
        np.testing.assert_allclose(share, [1 / 2, 2 / 7, 1 / 7, 2 / 35, 1 / 70, 0, 0, 0], atol=0.03)
    same = winners_of_draws(np.stack([scores[0]] * 2), np.stack([order[0]] * 2), 50)
    np.testing.assert_array_equal(same[0], same[1])
    only = winners_of_draws(scores[..., :1], np.zeros((2, 3, 1), int), 9)
    np.testing.assert_allclose(only, np.broadcast_to(scores[..., :1], (2, 3, 9)))


@pytest.mark.parametrize(("splits", "seeds", "uneven"), [(3, 1, 1.0), (5, 2, 3.0), (1, 3, 1.0)])
def test_intervals_of_equals_hold_all_at_once(splits, seeds, uneven):
    """Where the spread of few units dominates; t quantiles that pairs did not share, or none, fail here."""
    rng, held, width = np.random.default_rng(5), 0, []
    for _ in range(400):
        luck = (
            rng.normal(0, 0.05, (5, splits, seeds if splits == 1 else 1, 1))
            * np.array([uneven, 1, 1, 1, 1])[:, None, None, None]
        )
        values = luck + rng.normal(0, 0.1, (5, splits, seeds, 30))
        found = paired_intervals(values, np.arange(30 * splits).reshape(splits, 30))
        held += bool((abs(found.mean) <= found.half_width).all())
        width.append(found.half_width[1, 2])
    assert 0.93 <= held / 400 <= 0.995
    if uneven == 1:
        assert np.median(width) < 8 * np.sqrt(2 * 0.05**2 / max(splits, seeds))  # Student's t alone: 12
