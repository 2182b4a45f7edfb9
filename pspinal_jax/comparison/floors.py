"""What needs no training: k nearest neighbours, and ridge regression in closed form. scikit-learn computes them."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from pspinal_jax.comparison.settings import Scaling

FloorName = Literal["knn", "ridge"]
FLOORS: tuple[FloorName, ...] = ("knn", "ridge")

NEIGHBOURS = (1, 3, 5, 10, 20, 50)
METRICS = ("euclidean", "cosine")
PENALTIES = tuple(float(10.0**exponent) for exponent in np.arange(-2, 7.5, 0.5))
"""Of the sum of squares over all training examples."""


def floor_settings(name: FloorName, scaling: Scaling) -> list[dict[str, Any]]:
    """All that is tried on features standardised so; what does best on validation is taken, of equals the first."""
    if name == "ridge":
        return [{"penalty": penalty, "standardize": scaling} for penalty in PENALTIES]
    return [{"metric": metric, "k": k, "standardize": scaling} for metric in METRICS for k in NEIGHBOURS]


def predict_floor(
    name: FloorName,
    settings: list[dict[str, Any]],
    train: tuple[np.ndarray, np.ndarray],
    inputs: np.ndarray,
    num_classes: int,
) -> list[np.ndarray]:
    """Predictions int [M] of `inputs` [M, D] under each of `settings`, from `train` (inputs [N, D], labels [N])."""
    predict: Callable[..., list[np.ndarray]] = _ridge if name == "ridge" else _neighbours
    return predict(settings, train, inputs, num_classes)


def _ridge(
    settings: list[dict[str, Any]], train: tuple[np.ndarray, np.ndarray], inputs: np.ndarray, num_classes: int
) -> list[np.ndarray]:
    from sklearn.linear_model import RidgeClassifier

    predictions = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a penalty too small for the data: validation will tell
        for setting in settings:
            model = RidgeClassifier(alpha=setting["penalty"], solver="cholesky").fit(*train)
            predictions.append(np.asarray(model.predict(inputs)))
    return predictions


def _neighbours(
    settings: list[dict[str, Any]], train: tuple[np.ndarray, np.ndarray], inputs: np.ndarray, num_classes: int
) -> list[np.ndarray]:
    from sklearn.neighbors import NearestNeighbors

    most = min(len(train[1]), max(setting["k"] for setting in settings))
    nearest: dict[str, np.ndarray] = {}
    for metric in {setting["metric"] for setting in settings}:
        model = NearestNeighbors(n_neighbors=most, metric=metric, algorithm="brute").fit(train[0])
        nearest[metric] = train[1][model.kneighbors(inputs, return_distance=False)]
    return [_vote(nearest[setting["metric"]][:, : setting["k"]], num_classes) for setting in settings]


def _vote(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The most frequent of each row of `labels` [M, k], nearest first.

    Of equals it is the one with nearer neighbours (the smaller sum of ranks), then the first class.
    """
    rows, k = labels.shape
    votes = np.zeros((rows, num_classes), int)
    for rank in range(k):
        votes[np.arange(rows), labels[:, rank]] += k * k - rank  # all deductions of a row are less than one vote
    return votes.argmax(1)
