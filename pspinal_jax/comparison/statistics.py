"""Paired differences of accuracy with bootstrap intervals over splits, seeds and test examples."""

import numpy as np

DRAWS = 4000
_BLOCK = 500


def bootstrap_means(hits: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Mean accuracies [draws, M] of the M methods, all under the same draws.

    Splits, seeds within a split and test examples within a split are drawn with replacement. Of K splits K - 1 are
    drawn, and of S seeds S - 1: a mean of n values drawn from n varies too little, by (n - 1) / n, and a mean of n - 1
    as it should. One split, or one seed, stays as it is, and adds nothing to the interval.

    Args:
      hits: bool or float [M, K, S, T], whether a method's seed was right on a test example of a split.
      draws: how many.
      seed: of the draws.
    """
    methods, splits, seeds, examples = hits.shape
    rng = np.random.default_rng(seed)
    places = max(1, splits - 1)
    hits = hits.astype(np.float32)
    means = np.zeros((draws, methods))
    for start in range(0, draws, _BLOCK):
        size = min(_BLOCK, draws - start)
        for _ in range(places):
            chosen = rng.integers(splits, size=size) if splits > 1 else np.zeros(size, int)
            weights = _shares(rng, size, examples, examples)
            seed_weights = _shares(rng, size, seeds, max(1, seeds - 1)) if seeds > 1 else np.ones((size, 1))
            for split in np.unique(chosen):
                here = chosen == split
                accuracies = hits[:, split].reshape(-1, examples) @ weights[here].T
                accuracies = accuracies.reshape(methods, seeds, -1)
                means[start : start + size][here] += np.einsum("msb,bs->bm", accuracies, seed_weights[here]) / places
    return means


def _shares(rng: np.random.Generator, size: int, items: int, drawn: int) -> np.ndarray:
    """Float32 [size, items]: the share of each of `items` in `drawn` draws with replacement."""
    counts = np.stack([np.bincount(rng.integers(items, size=drawn), minlength=items) for _ in range(size)])
    return (counts / drawn).astype(np.float32)


def interval_95(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of `values`."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def spread(values: list[float]) -> float:
    """Standard deviation, of a sample; 0 for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
