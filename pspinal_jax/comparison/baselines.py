"""The baselines: classifiers that are fitted whole, each along a grid of settings.

A fit gives scores [M, C], larger for a likelier class; softmax of them is meant, after a temperature on validation.
Linear ones give their weights too.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pspinal_jax.comparison.answers import NEVER

Settings = list[dict[str, Any]]
_LEAST = 1e-7
"""The smallest probability that an estimator is taken at its word for."""


class Linear(NamedTuple):
    """Scores x W + b: weights float [D, C], bias float [C]."""

    weights: np.ndarray
    bias: np.ndarray


class Fitted(NamedTuple):
    """What a baseline says under one setting.

    Attributes:
      scores: float [M, C] of the inputs to predict.
      linear: what they come from where they are linear in the inputs, else None.
    """

    scores: np.ndarray
    linear: Linear | None


def fit_baseline(
    name: str, settings: Settings, train: tuple[np.ndarray, np.ndarray], inputs: np.ndarray, num_classes: int
) -> Iterator[Fitted]:
    """Fit the baseline `name` to `train` (inputs [N, D], labels int [N]) under each of `settings`, one after the other.

    Args:
      name: one of `BASELINES`.
      settings: some of its settings there.
      train: what it is fitted to.
      inputs: [M, D], to predict.
      num_classes: C.
    """
    present, labels = np.unique(train[1], return_inverse=True)
    for found in _FITS[name](settings, train[0], labels, inputs):
        if isinstance(found, Linear):
            weights = _spread(found.weights, present, num_classes, 0.0)
            bias = _spread(found.bias, present, num_classes, NEVER)
            yield Fitted(inputs @ weights + bias, Linear(weights, bias))
        else:
            yield Fitted(_spread(found, present, num_classes, NEVER), None)


def fit_estimator(
    estimator: Any, train: tuple[np.ndarray, np.ndarray], inputs: np.ndarray, num_classes: int, seed: int
) -> Fitted:
    """What a copy of a scikit-learn classifier says, whose random states are `seed`; else as `fit_baseline`."""
    from sklearn.base import clone

    fitted = clone(estimator)
    fitted.set_params(**dict.fromkeys(random_states(fitted), seed)).fit(*train)
    classes = np.unique(train[1])
    if hasattr(fitted, "predict_proba"):
        scores = np.log(np.maximum(fitted.predict_proba(inputs), _LEAST))
    elif hasattr(fitted, "decision_function"):
        scores = fitted.decision_function(inputs)
        scores = np.stack([-scores, scores], 1) if scores.ndim == 1 else scores
    else:
        scores = (fitted.predict(inputs)[:, None] == classes).astype(float)
    return Fitted(_spread(scores, classes, num_classes, NEVER), None)


def random_states(estimator: Any) -> list[str]:
    """The parameters that seed an estimator, those of its parts included; none where it always does the same."""
    return [name for name in estimator.get_params() if name.rpartition("__")[2] == "random_state"]


def _spread(columns: np.ndarray, classes: np.ndarray, num_classes: int, fill: float) -> np.ndarray:
    """[..., C] with the last axis of `columns` at `classes`, and `fill` at the others."""
    if len(classes) == num_classes:
        return columns
    whole = np.full((*columns.shape[:-1], num_classes), fill, columns.dtype)
    whole[..., classes] = columns
    return whole


def _ridge(settings: Settings, rows: np.ndarray, labels: np.ndarray, inputs: np.ndarray) -> Iterator[Linear]:
    """Least squares to 1 for the class and -1 for others, the penalty on the sum of squares over all examples."""
    centre, targets = rows.mean(0), 2 * np.eye(labels.max() + 1)[labels] - 1
    mean, (variances, axes) = targets.mean(0), principal_axes(rows - centre)
    along = axes.T @ ((rows - centre).T @ (targets - mean)) / len(labels)
    for setting in settings:
        weights = axes @ (along / (variances + setting["penalty"] / len(labels))[:, None])
        yield Linear(weights, mean - centre @ weights)


def _neighbours(settings: Settings, rows: np.ndarray, labels: np.ndarray, inputs: np.ndarray) -> Iterator[np.ndarray]:
    from sklearn.neighbors import NearestNeighbors

    largest, nearest = min(len(labels), max(setting["k"] for setting in settings)), {}
    for metric in {setting["metric"] for setting in settings}:  # one search for every k
        model = NearestNeighbors(n_neighbors=largest, metric=metric, algorithm="brute").fit(rows)
        nearest[metric] = labels[model.kneighbors(inputs, return_distance=False)]
    classes = labels.max() + 1
    for setting in settings:
        counts = votes(nearest[setting["metric"]][:, : setting["k"]], classes)
        yield np.log((counts + 1 / classes) / (setting["k"] + 1))


def votes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each class stands in the rows of `labels` [M, k], nearest first, as float [M, C].

    Of classes that stand there equally often, the one with nearer neighbours (the smaller sum of ranks) has a little
    more; scikit-learn's classifier takes the first class.
    """
    rows, k = labels.shape
    counts = np.zeros((rows, num_classes), int)
    for rank in range(k):
        counts[np.arange(rows), labels[:, rank]] += k * k - rank  # all deductions of a row are less than one vote
    return counts / (k * k)


def _class_means(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[C, D]."""
    ones = np.eye(labels.max() + 1, dtype=np.float32)[labels]
    return (ones.T @ rows) / ones.sum(0)[:, None]


def _nearest_mean(settings: Settings, rows: np.ndarray, labels: np.ndarray, inputs: np.ndarray) -> Iterator[Linear]:
    """-|x - m|^2 / 2 sqrt(D) but for |x|^2, which all classes share; cosine: x m / |m|, likewise but for |x|."""
    means, root = _class_means(rows, labels), np.sqrt(rows.shape[1])
    squares = (means**2).sum(1)
    for setting in settings:
        cosine = setting["metric"] == "cosine"
        unit = means / np.sqrt(np.maximum(squares, 1e-30))[:, None]
        yield Linear(unit.T, np.zeros(len(means))) if cosine else Linear(means.T / root, -squares / (2 * root))


def _discriminant(settings: Settings, rows: np.ndarray, labels: np.ndarray, inputs: np.ndarray) -> Iterator[Linear]:
    """Linear discriminant analysis: one covariance S for all classes, shrunk to (1 - s) S + s trace(S) / D.

    As scikit-learn's with ``solver="lsqr"`` and a number for shrinkage, but of one eigendecomposition for all of them.
    """
    means, shares = _class_means(rows, labels).astype(np.float64), np.bincount(labels) / len(labels)
    variances, axes = principal_axes(rows - means[labels].astype(rows.dtype))
    width = len(axes)
    average = max(variances.sum() / width, 1e-30)
    along = means @ axes
    beside = means - along @ axes.T if len(variances) < width else 0.0
    for setting in settings:
        floor = setting["shrinkage"] * average
        weights = ((along / ((1 - setting["shrinkage"]) * variances + floor)) @ axes.T + beside / floor).T
        yield Linear(weights, np.log(shares) - (means * weights.T).sum(1) / 2)


def principal_axes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(second moments [r], orthonormal axes [D, r]) of centred `rows` [N, D]; r <= min(N, D), beyond them it is 0."""
    from threadpoolctl import threadpool_limits

    count, width = rows.shape
    gram = (rows.T @ rows if width <= count else rows @ rows.T).astype(np.float64) / count
    with threadpool_limits(1):  # as fast as two threads, which wait for each other 10 times as long on busy cores
        variances, vectors = np.linalg.eigh(gram)
    if width <= count:
        return np.maximum(variances, 0.0), vectors
    kept = variances > 1e-6 * variances[-1]
    variances = variances[kept]
    return variances, rows.T @ vectors[:, kept] / np.sqrt(variances * count)


def _logistic(settings: Settings, rows: np.ndarray, labels: np.ndarray, inputs: np.ndarray) -> Iterator[Linear]:
    """Multinomial logistic regression with scikit-learn's C: the sum of losses times C, and |W|^2 / 2.

    On principal axes, where the penalty is the same, unless there are very many. Each fit begins where the two before
    lead to, in equal steps of log C, which takes less than half of the iterations of beginning at the one before.
    """
    centre, classes = rows.mean(0), labels.max() + 1
    if min(rows.shape) <= MAX_AXES:
        variances, axes = principal_axes(rows - centre)
        turned = (rows - centre) @ axes.astype(rows.dtype)
    else:
        variances, axes, turned = rows.var(0), None, rows - centre
    point: Any = (np.zeros((len(variances), classes), np.float32), np.zeros(classes, np.float32))
    start, operands = point, jax.device_put((turned.astype(np.float32), labels, variances.astype(np.float32)))
    for setting in settings:
        # Of two classes scikit-learn penalises the difference of the weights, of which these have a half each.
        decay = (2 if classes == 2 else 1) / (setting["C"] * len(labels))
        before = point
        # Accelerators round inputs to fewer bits by default; optax mixes dtypes.
        with jax.default_matmul_precision("float32"), jax.numpy_dtype_promotion("standard"):
            point, _ = jax.device_get(_minimize(*operands, *jax.device_put((np.float32(decay), start))))
        start = jax.tree.map(lambda now, last: 2 * now - last, point, before)
        weights = np.asarray(point[0], np.float64)
        weights = weights if axes is None else axes @ weights
        yield Linear(weights, np.asarray(point[1]) - centre @ weights)


MAX_AXES = 2048
"""Above, finding the axes takes longer than the iterations that they save."""
MAX_ITERATIONS, PATIENCE = 500, 3
TOLERANCE = 2e-7
"""What the loss may lie above its minimum, nats an example, as the gradient tells; where float32 sees no such gain for
`PATIENCE` iterations, nothing is left to gain."""
_TINY = 1e-6


@jax.jit
def _minimize(inputs: jax.Array, labels: jax.Array, variances: jax.Array, decay: jax.Array, start: Any) -> Any:
    """Minimise mean cross-entropy + decay |W|^2 / 2 by L-BFGS from `start`, (W [r, C], b [C]).

    The curvature along an axis is about its variance times the mean of p (1 - p) for each class, plus `decay`: scaled
    by its root, the problem is near to round, and half of the squared gradient near to what is left to gain.

    Returns:
      ((W, b), iterations).
    """
    # The default 20 evaluations are spent only where float32 cannot tell the loss from its minimum.
    optimizer = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(10, initial_guess_strategy="one"))
    probabilities = jax.nn.softmax(inputs @ start[0] + start[1])
    curvature = jnp.mean(probabilities * (1 - probabilities), 0)
    scales = jax.lax.rsqrt(variances[:, None] * curvature + decay), jax.lax.rsqrt(curvature + _TINY)

    def loss(point: Any) -> jax.Array:
        weights, bias = jax.tree.map(jnp.multiply, point, scales)
        losses = optax.softmax_cross_entropy_with_integer_labels(inputs @ weights + bias, labels)
        return jnp.mean(losses) + decay / 2 * jnp.vdot(weights, weights)

    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        point, state, best, since = carry
        value, gradient = value_and_grad(point, state=state)
        updates, state = optimizer.update(gradient, state, point, value=value, grad=gradient, value_fn=loss)
        improved = value < best - TOLERANCE
        since = jnp.where(improved, 0, since + 1)
        return optax.apply_updates(point, updates), state, jnp.where(improved, value, best), since

    def goes_on(carry: Any) -> jax.Array:
        _, state, _, since = carry
        count, gradient = (optax.tree.get(state, name) for name in ("count", "grad"))
        left = optax.tree.norm(gradient, squared=True) / 2
        return (count == 0) | ((count < MAX_ITERATIONS) & (left > TOLERANCE) & (since < PATIENCE))

    point = jax.tree.map(jnp.divide, start, scales)
    point, state, *_ = jax.lax.while_loop(goes_on, step, (point, optimizer.init(point), jnp.inf, 0))
    return jax.tree.map(jnp.multiply, point, scales), optax.tree.get(state, "count")


_FITS: dict[str, Callable[..., Iterator[Any]]] = {
    "logistic": _logistic,
    "lda": _discriminant,
    "nearest_mean": _nearest_mean,
    "knn": _neighbours,
    "ridge": _ridge,
}
BASELINES: dict[str, Settings] = {
    "logistic": [{"C": float(f"{10.0**exponent:.4g}")} for exponent in np.linspace(-6, 5, 45)],
    "lda": [{"shrinkage": share} for share in (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)],
    "nearest_mean": [{"metric": metric} for metric in ("euclidean", "cosine")],
    "knn": [{"metric": metric, "k": k} for metric in ("euclidean", "cosine") for k in (1, 3, 5, 10, 20, 50)],
    "ridge": [{"penalty": float(10.0**exponent)} for exponent in np.arange(-2, 7.5, 0.5)],
}
"""All that is tried; what does best on validation is taken, of equals the first."""
BY_LIKELIHOOD = ("logistic",)
"""Those that maximise it, whose settings are chosen by it too: over a wide range of C accuracy is level, and a few
hundred examples do not tell which C is best. Of the ways to scale features, accuracy chooses."""
FIRST_BASELINES = ("knn", "ridge")
"""Those of earlier versions."""
