"""The heads as a scikit-learn classifier."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data

from pspinal_jax.heads import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.training.examples import Source, one_example
from pspinal_jax.training.fit import CompiledTraining
from pspinal_jax.training.fitted import predict_logits
from pspinal_jax.training.optimizers import Schedule, learning_rates
from pspinal_jax.training.stages import TrainingStage
from pspinal_jax.training.step import cross_entropy


class HeadClassifier(ClassifierMixin, BaseEstimator):
    """A classifier on features: one of our heads, trained by AdamW on the cross-entropy.

    Features are standardised. Training compiles once per head, number of features, number of classes and, up to a
    factor of two, number of examples. Fitting again with another learning rate, number of epochs or seed compiles
    nothing.

    Example::

        >>> from sklearn.datasets import load_iris
        >>> from pspinal_jax.sklearn import HeadClassifier
        >>> X, y = load_iris(return_X_y=True)
        >>> HeadClassifier(epochs=20, random_state=0).fit(X, y).predict_proba(X[:5]).shape
        (5, 3)

    Args:
      head: ``"progressive"``, ``"spinal"``, ``"mlp"`` (one hidden layer) or ``"dense"`` (a linear layer).
      layer_width: width of each hidden layer.
      num_layers: number of hidden layers of 'progressive' and 'spinal'.
      dropout_rate: probability of dropping a feature in training.
      learning_rate: peak learning rate; it rises over a tenth of the steps and then falls to 0 along a cosine.
      weight_decay: weight decay of AdamW.
      label_smoothing: fraction of the target that is spread evenly over the classes.
      epochs: passes over the examples.
      batch_size: examples per step.
      random_state: seed of the initial parameters, the order of examples and dropout.
      verbose: whether to show a progress bar.

    Attributes:
      classes_: the labels, in the order of the columns of `predict_proba`.
      n_features_in_: number of features.
      feature_names_in_: names of the features, if `X` was a frame whose column names are text.
      params_: the head's parameters, as NumPy arrays.
      loss_curve_: mean training loss of each epoch.
    """

    def __init__(
        self,
        head: Literal["progressive", "spinal", "mlp", "dense"] = "progressive",
        *,
        layer_width: int = 128,
        num_layers: int = 4,
        dropout_rate: float = 0.2,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        label_smoothing: float = 0.0,
        epochs: int = 50,
        batch_size: int = 64,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.head = head
        self.layer_width = layer_width
        self.num_layers = num_layers
        self.dropout_rate = dropout_rate
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.epochs = epochs
        self.batch_size = batch_size
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "HeadClassifier":
        """Train on features [N, D] and labels [N] of any type; `sample_weight` [N] weights the examples' losses."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        weights = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        if not weights.any():
            raise ValueError("sample_weight holds zeros only, expected a weight above 0")
        weights = weights / weights.mean()
        self._shift = np.average(X, axis=0, weights=weights)
        deviation = np.sqrt(np.average((X - self._shift) ** 2, axis=0, weights=weights))
        self._scale = 1 / np.where(deviation > 0, deviation, 1)
        targets = labels.astype(np.int32), weights.astype(np.float32)
        source = _padded_source(self._scaled(X), targets, self.batch_size)
        schedule = Schedule("one_cycle", self.learning_rate, warmup_fraction=0.1)
        result = self._compiled().train(
            source,
            self.epochs,
            int(check_random_state(self.random_state).randint(2**31)),
            learning_rates=lambda epoch, steps: learning_rates(schedule, epoch, steps, self.epochs),
            shows_progress=self.verbose,
        )
        self.params_ = jax.device_get(result.variables["params"])
        self.loss_curve_ = [line["train_loss"] for line in result.history]
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities [N, C]."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        programs = self._compiled().programs
        variables = programs.replicate({"params": self.params_, "batch_stats": {}})
        logits = predict_logits(programs, variables, self._scaled(X))
        return np.asarray(softmax(logits.astype(np.float64), axis=1))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class [N]."""
        best = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[best])

    def _scaled(self, X: np.ndarray) -> np.ndarray:
        return np.asarray((X - self._shift) * self._scale, np.float32)

    def _compiled(self) -> CompiledTraining:
        head = _make_head(self.head, len(self.classes_), self.layer_width, self.num_layers, self.dropout_rate)
        return _compile(head, self.n_features_in_, self.batch_size, self.weight_decay, self.label_smoothing)


def _padded_source(inputs: np.ndarray, targets: tuple[np.ndarray, np.ndarray], batch_size: int) -> Source:
    """Examples, and zeros of weight 0 up to a power of two of whole batches.

    The last batch of an epoch is filled with them, and trainings on about as many examples call the same program.
    """
    batches = 1 << (len(inputs) // batch_size).bit_length()
    after = batches * batch_size - len(inputs) - 1
    # An order ends in zeros, so example 0 is a padding one.
    arrays = jax.tree.map(lambda leaf: np.pad(leaf, [(1, after)] + [(0, 0)] * (leaf.ndim - 1)), (inputs, targets))
    steps = -(-len(inputs) // batch_size)
    stage = TrainingStage("train", 1 + np.arange(len(inputs)), None, steps, steps, 0)
    return Source(stage, batch_size, one_example(arrays), arrays)


def _make_head(name: str, num_classes: int, width: int, num_layers: int, dropout_rate: float) -> nn.Module:
    layered: dict[str, Any] = {"progressive": ProgressiveSpinalHead, "spinal": SpinalHead}
    if name in layered:
        return layered[name](num_classes, width, num_layers, dropout_rate)
    if name not in ("mlp", "dense"):
        raise ValueError(f"head is {name!r}, expected progressive, spinal, mlp or dense")
    return MLPHead(num_classes, width, dropout_rate) if name == "mlp" else DenseHead(num_classes, dropout_rate)


@functools.lru_cache(maxsize=32)
def _compile(
    head: nn.Module, num_features: int, batch_size: int, weight_decay: float, label_smoothing: float
) -> CompiledTraining:
    def loss(logits: jax.Array, targets: tuple[jax.Array, jax.Array]) -> jax.Array:
        labels, weights = targets
        return weights * cross_entropy(logits, labels, label_smoothing)

    scalar = functools.partial(jax.ShapeDtypeStruct, ())
    example = jax.ShapeDtypeStruct((num_features,), jnp.float32), (scalar(jnp.int32), scalar(jnp.float32))
    # The learning rate is an operand of the step, see `LoopConfig`.
    return CompiledTraining(head, example, batch_size, optimizer=optax.adamw(1.0, weight_decay=weight_decay), loss=loss)
