"""Simultaneous 95 % intervals of all paired differences of M methods, from few splits, seeds and trials.

A mean difference varies by what differs between units (splits, or the seeds of one split), by what all units share
(test examples that are the same), and by the luck of the tuning. The first is known from few units: Student's t widens
it, which alone would leave no power (of 3 splits and 6 methods, 15 standard errors), so that pairs learn from each
other how large it is. The parts join so that the intervals hold at least as often as they say, whichever dominates
(S. K. Banerjee, "Approximate confidence interval for linear functions of means of k populations", Sankhya 1960).
"""

from typing import NamedTuple

import numpy as np

LEVEL = 0.95
MIN_UNITS = 3
"""Splits, or seeds of one split, below which nothing is claimed."""
TUNING_DRAWS = 1000
TUNING_DEGREES = 3.0
"""Degrees of freedom of a variance over winners of half of the trials; results/coverage.py measures whether they do."""


class Intervals(NamedTuple):
    """Of the difference of every method (row) to every other (column), each [M, M].

    Attributes:
      mean: the differences.
      half_width: of their intervals, all of which hold at once with 95 % probability.
      standard_error: of the differences.
      units: how many splits, or seeds of one split, there are.
    """

    mean: np.ndarray
    half_width: np.ndarray
    standard_error: np.ndarray
    units: int


def paired_intervals(
    values: np.ndarray, tests: np.ndarray, tuned: np.ndarray | None = None, rounding: float = 0.0
) -> Intervals:
    """Intervals of all differences of means.

    With one split they are of that split's training examples; with several, of any such split of this data.

    Args:
      values: float or bool [M, K, S, T], what each test example adds to a method's score (1 or 0, for accuracy), of K
        splits and S seeds.
      tests: integers [K, T], which examples are tested in each split.
      tuned: [M, K, B], the scores of the winners in B draws of the trials, equal for methods that share their trials,
        constant for those that have none; None where there is no such luck.
      rounding: the least amount by which scores can differ; half of it each way is added, so that methods that agree on
        every example of a small test are not taken for equal (A. Agresti & Y. Min, Biometrics 2005).
    """
    from scipy.stats import norm, t

    values = np.asarray(values, np.float64)
    methods, splits, seeds, examples = values.shape
    means = values.mean(-1)  # [M, K, S]
    shared = np.mean([_over_examples(values[:, split]) for split in range(splits)], 0) / examples
    units, by_unit = (splits, means.mean(-1)) if splits > 1 else (seeds, means[:, 0])
    if splits > 1:
        shared *= np.mean([np.isin(a, b).mean() for i, a in enumerate(tests) for b in tests[:i]])
    between = _of_pairs(_covariance(by_unit) / units) if units > 1 else np.zeros((methods, methods))
    shared = _of_pairs(shared) + rounding**2
    tail = (1 - LEVEL) / max(methods * (methods - 1), 1)  # Bonferroni's: pairs have standard errors of their own

    def squared(variances: np.ndarray, degrees: float) -> np.ndarray:
        return np.asarray(t.isf(tail, degrees) ** 2 * variances)

    varying = (between > 0).any(1).sum()  # with a pair's own, at most as many degrees as all methods pooled
    moderated, degrees = _moderated(between, max(units - 1, 1), varying - 2)
    variance, squares = moderated + shared, squared(moderated, degrees) + norm.isf(tail) ** 2 * shared
    if tuned is not None:
        sources, source = np.unique(tuned, axis=0, return_inverse=True)
        source, lucks = source.reshape(-1), np.array([_luck(each) for each in sources])
        lucks, degrees = _moderated(lucks, TUNING_DEGREES, (lucks > 0).sum() - 1)
        luck = (lucks[source][:, None] + lucks[source]) * (source[:, None] != source)
        variance, squares = variance + luck, squares + squared(luck, degrees)
    mean = means.mean((1, 2))
    return Intervals(mean[:, None] - mean, np.sqrt(squares), np.sqrt(variance), units)


def _covariance(values: np.ndarray) -> np.ndarray:
    """Of the rows of `values`, [M, M]."""
    return np.cov(values).reshape(len(values), len(values))


def _over_examples(values: np.ndarray) -> np.ndarray:
    """Covariances [M, M] of methods over test examples, as all seeds share them, from values [M, S, T]."""
    seeds = values.shape[1]
    among = _covariance(values.mean(1))
    if seeds == 1:
        return among
    return (seeds**2 * among - sum(map(_covariance, values.swapaxes(0, 1)))) / (seeds * (seeds - 1))


def _luck(tuned: np.ndarray) -> float:
    """Variance over draws of [K, B]; of several splits what they have in common, as the rest differs between them."""
    among = _covariance(tuned)
    splits = len(among)
    return float(max((among.sum() - np.trace(among)) / (splits * (splits - 1)), 0.0) if splits > 1 else among[0, 0])


def _of_pairs(covariance: np.ndarray) -> np.ndarray:
    """Variances [M, M] of the differences of methods with `covariance`; estimates below 0 are 0."""
    own = np.diagonal(covariance)
    return np.maximum(own[:, None] + own - 2 * covariance, 0.0)


def _moderated(variances: np.ndarray, degrees: float, others: int) -> tuple[np.ndarray, float]:
    """`variances` drawn towards all of them, and their degrees of freedom; a symmetric matrix counts once.

    As G. Smyth's "Linear models and empirical Bayes methods" (2004) does for genes: the more alike the variances are,
    the more one learns from the others, as much as from `others` independent ones. Its own remains the least that each
    gets, so that what is noisier than others is not taken for quiet.
    """
    from scipy.optimize import brentq
    from scipy.special import digamma, polygamma

    found = variances[np.triu_indices(len(variances), 1)] if variances.ndim == 2 else variances
    found = found[found > 0]  # what does not vary at all, as baselines over seeds, is not of their kind
    if len(found) < 3:
        return variances, degrees
    logs = np.log(found) - digamma(degrees / 2) + np.log(degrees / 2)
    excess = float(logs.var(ddof=1) - polygamma(1, degrees / 2))
    prior = most = float(others * degrees)
    if excess > polygamma(1, most / 2):
        prior = 2 * brentq(lambda half: polygamma(1, half) - excess, 1e-8, most / 2)
    centre = np.exp(logs.mean() + digamma(prior / 2) - np.log(prior / 2))
    pooled = (prior * centre + degrees * variances) / (prior + degrees)
    return np.where(variances > 0, np.maximum(pooled, variances), 0.0), prior + degrees


def winners_of_draws(scores: np.ndarray, order: np.ndarray, draws: int = TUNING_DRAWS, seed: int = 0) -> np.ndarray:
    """Scores [M, K, B] of the trial that wins in each of B draws of half of the trials.

    Half without replacement, as the bootstrap of a maximum is inconsistent (P. Bickel & D. Freedman, 1981); all methods
    and splits see the same draws, as they have the same trials.

    Args:
      scores: [M, K, N], of every trial on validation.
      order: integers [M, K, N], the trials from best to worst.
      draws: B.
      seed: of the draws.
    """
    trials = scores.shape[-1]
    kept = np.random.default_rng(seed).random((draws, trials)).argsort(1) < -(-trials // 2)
    first = kept[:, order].argmax(-1)  # [B, M, K]
    winners = np.take_along_axis(order, np.moveaxis(first, 0, -1), -1)
    return np.take_along_axis(scores, winners, -1)
