"""Scores of predictions, their intervals, scores by class and confusions, and plots of them.

Accuracy hides classes that fail: if 90 % of the examples are in one class, a model that always predicts it has 90 %.
Balanced accuracy is the mean recall of the classes with examples, and macro F1 their mean F1 (K. Brodersen et al., "The
balanced accuracy and its posterior distribution", ICPR 2010). The calibration error is the expected calibration error
of C. Guo et al., "On calibration of modern neural networks", ICML 2017: the gap between accuracy and confidence in bins
of equal width, weighted by the number of examples.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

from pspinal_jax.errors import printable
from pspinal_jax.pictures import drawable, drawn
from pspinal_jax.training.fitted import History

CALIBRATION_BINS = 15  # as in Guo et al.
LEVEL = 0.95
RESAMPLES = 1000
# Harmonic mean of the classes' examples from which on macro F1 gets an interval; below, too few intervals hold it.
_MIN_MEMBERS = 3.5
_MIN_CLASSES_FOR_TOP_5 = 6
_MAX_CONFUSED = 10
MAX_NUMBERED_CLASSES = 30  # of a confusion matrix's plot; more show colours only
_MAX_DRAWN_CLASSES = 500
_MAX_CAPTION = 26
_MAX_MATRIX = 1000  # classes up to which the confusion matrix is written as rows of C numbers
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Scored:
    """A classifier's answers for N labelled examples.

    Attributes:
      labels: integers [N].
      predictions: integers [N], the most probable class.
      confidence: float64 [N], its probability.
      log_likelihood: float64 [N], the log-probability of the true class, in nats.
      rank: integers [N], the number of classes that are more probable than the true one.
      untempered: float64 [N, 2], confidence and log-likelihood at temperature 1.
      known: float64 [N], scores of known images, see `pspinal_jax.runs.calibration`; NaN without such scores.
    """

    labels: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray
    log_likelihood: np.ndarray
    rank: np.ndarray
    untempered: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2)))
    known: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(
        cls,
        labels: np.ndarray,
        log_probabilities: np.ndarray,
        known: np.ndarray | None = None,
        temperature: float | None = None,
    ) -> "Scored":
        """Make the answers from labels [N], log-probabilities [N, C] at a temperature, and scores [N].

        Among equally probable classes, the first is predicted.
        """
        rows = np.arange(len(labels))
        predictions = log_probabilities.argmax(1)
        true = log_probabilities[rows, labels]
        before = np.arange(log_probabilities.shape[1]) < np.asarray(labels)[:, None]
        ahead = (log_probabilities > true[:, None]) | ((log_probabilities == true[:, None]) & before)
        confidence = np.exp(log_probabilities[rows, predictions])
        plain = log_softmax(log_probabilities * temperature) if temperature else log_probabilities
        untempered = np.column_stack([np.exp(plain[rows, predictions]), plain[rows, labels]])
        known = np.full(len(labels), np.nan) if known is None else known
        return cls(np.asarray(labels), predictions, confidence, true, ahead.sum(1), untempered, known)

    @classmethod
    def joined(cls, parts: "list[Scored]") -> "Scored":
        """The concatenation of `parts`."""
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})

    def confusion(self, num_classes: int) -> "csr_array":
        """Confusion matrix int64 [C, C]: rows are true classes, columns are predictions."""
        from scipy.sparse import coo_array

        shape = (num_classes, num_classes)
        return coo_array((np.ones(len(self.labels), int), (self.labels, self.predictions)), shape=shape).tocsr()

    def surest_mistakes(self, most: int) -> np.ndarray:
        """Indices of at most `most` wrong predictions, the most confident first."""
        wrong = np.flatnonzero(self.predictions != self.labels)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:most]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 [N, C] of logits."""
    rows = np.asarray(logits, np.float64)
    return rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)


def scores_by_class(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Class name -> support, precision, recall and f1; None for an undefined quotient."""
    # scikit-learn, which gives the same numbers, takes 140 MB to import.
    counted = _count_classes(labels, predictions, np.ones(len(labels)), len(class_names))
    return [
        {
            "name": name,
            "support": int(support),
            "precision": _ratio(correct, predicted),
            "recall": _ratio(correct, support),
            "f1": _ratio(2 * correct, support + predicted),
        }
        for name, support, predicted, correct in zip(class_names, *counted, strict=True)
    ]


def _count_classes(
    true: np.ndarray, predicted: np.ndarray, counts: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many examples each class has, how many are predicted to be of it, and how many of these rightly, each [C]."""
    ways = ((true, counts), (predicted, counts), (true, counts * (true == predicted)))
    support, named, correct = (np.bincount(classes, weights, num_classes) for classes, weights in ways)
    return support, named, correct


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def averages(classes: list[dict[str, Any]]) -> dict[str, float]:
    """balanced_accuracy and macro_f1 of `scores_by_class`, over the classes with examples."""
    present = [each for each in classes if each["support"]]
    return {
        "balanced_accuracy": float(np.mean([each["recall"] for each in present])),
        "macro_f1": float(np.mean([each["f1"] for each in present])),
    }


def worst_first(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`classes` sorted by recall, then F1, then number of wrong examples; classes without examples come last."""
    present = [each for each in classes if each["support"]]
    order = sorted(present, key=lambda each: (each["recall"], each["f1"], -each["support"]))
    return order + [each for each in classes if not each["support"]]


def score_report(scored: Scored, class_names: Sequence[str], temperature: float | None = None) -> dict[str, Any]:
    """The scores in evaluation.json, for answers at this temperature.

    Returns:
      A dict with accuracy, balanced_accuracy and macro_f1 (0 .. 1), their intervals (95 %, see `intervals`),
      top_5_accuracy (from six classes on), loss (negative log-likelihood in nats), calibration_error (0 .. 1),
      calibration_bins, correct, examples, classes (see `scores_by_class`), class_accuracy (recall by name), confusion
      [C, C] (rows are true classes), and most_confused (pairs with their count and its fraction of the true class).
      For more than 1,000 classes, confusion is None and confusion_counts lists [true, predicted, count] of all pairs
      that occur. With a temperature, it also has temperature and untempered (loss and calibration_error at 1).
    """
    labels, predictions, count = scored.labels, scored.predictions, len(scored.labels)
    confusion = scored.confusion(len(class_names))
    right = int(confusion.trace())
    classes = scores_by_class(labels, predictions, class_names)
    report = {
        "accuracy": right / count,
        **averages(classes),
        "intervals": intervals(confusion),
        "correct": right,
        "examples": count,
        "loss": float(-scored.log_likelihood.mean()),
        "calibration_error": calibration_error(scored.confidence, predictions == labels),
        "calibration_bins": CALIBRATION_BINS,
        "class_accuracy": {each["name"]: each["recall"] for each in classes},
        "classes": classes,
        "most_confused": most_confused(confusion, class_names),
        "confusion": confusion.toarray().tolist() if len(class_names) <= _MAX_MATRIX else None,
    }
    if report["confusion"] is None:
        report["confusion_counts"] = np.column_stack(_pairs(confusion)).tolist()
    if temperature is not None:
        confidence, likelihood = scored.untempered.T
        before = calibration_error(confidence, predictions == labels)
        report["temperature"] = temperature
        report["untempered"] = {"loss": float(-likelihood.mean()), "calibration_error": before}
    if len(class_names) >= _MIN_CLASSES_FOR_TOP_5:
        report["top_5_accuracy"] = float((scored.rank < 5).mean())
    return report


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: mean gap between accuracy and confidence over bins (k/B, (k+1)/B], by example.

    Args:
      confidence: [N], probability of the predicted class.
      correct: bool [N], whether the prediction is right.
      bins: B, number of bins.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(correct))


def rejections(scored: Scored, thresholds: Mapping[float, float]) -> list[dict[str, float | None]]:
    """Accuracy on accepted examples for each fraction `accept` and its threshold.

    Returns:
      Dicts with accept, threshold, accepted (fraction of the examples that reach it) and accuracy (theirs, or None).
    """
    right, found = scored.predictions == scored.labels, []
    for accept, threshold in thresholds.items():
        passed = scored.known >= threshold
        accuracy = float(right[passed].mean()) if passed.any() else None
        share = {"accept": accept, "threshold": threshold, "accepted": float(passed.mean())}
        found.append({**share, "accuracy": accuracy})
    return found


def _pairs(confusion: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true class, predicted class, count) of the pairs that occur in [C, C], by row and column."""
    from scipy.sparse import csr_array

    held = csr_array(confusion)
    held.sum_duplicates()
    held.eliminate_zeros()
    pairs = held.tocoo()
    return pairs.row, pairs.col, pairs.data


def bootstrap(confusion: Any) -> tuple[np.ndarray, np.ndarray]:
    """Balanced accuracy and macro F1, each [R], of 1,000 bootstrap samples of the test examples with seed 0.

    Args:
      confusion: [C, C], an array or a sparse one.
    """
    true, predicted, counts = _pairs(confusion)
    rng, total = np.random.default_rng(0), counts.sum()
    found = []
    for _ in range(RESAMPLES):
        drawn = rng.multinomial(total, counts / total)
        found.append(_mean_scores(*_count_classes(true, predicted, drawn, confusion.shape[0])))
    balanced, macro = np.transpose(found)
    return balanced, macro


def _mean_scores(support: np.ndarray, named: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
    """Balanced accuracy and macro F1 of counts of `_count_classes`, over the classes with examples."""
    present = support > 0
    recall, f1 = correct[present] / support[present], 2 * correct[present] / (support + named)[present]
    return float(recall.mean()), float(f1.mean())


def intervals(confusion: Any) -> dict[str, Any]:
    """95 % intervals over test examples, from the confusion matrix [C, C], as an array or a sparse matrix.

    accuracy: Wilson's score interval. balanced_accuracy: percentiles of 1,000 bootstrap samples with seed 0 (B. Efron,
    1979). macro_f1: see `_macro_f1_interval`, or None if classes have too few examples. The intervals cover the choice
    of test examples, and not the randomness of training.
    """
    total, right = int(confusion.sum()), int(confusion.trace())
    recall, f1 = bootstrap(confusion)
    macro = _macro_f1_interval(confusion, f1)
    how = (
        "macro F1 by Wilson's score interval of as many examples as have its standard deviation in these draws"
        if macro is not None
        else "none for macro F1, as most classes have too few examples"
    )
    return {
        "level": LEVEL,
        "accuracy": list(_wilson(right / total, total)),
        "balanced_accuracy": np.percentile(recall, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]).tolist(),
        "macro_f1": macro,
        "method": "accuracy by Wilson's score interval, balanced accuracy by the bootstrap "
        f"({RESAMPLES:,} draws of the test examples), {how}",
    }


def _macro_f1_interval(confusion: Any, drawn: np.ndarray) -> list[float] | None:
    """Wilson's score interval about macro F1, of as many examples as give a proportion the variance of `drawn`.

    The bootstrap's percentiles hold the truth too seldom: F1 of a few examples a class is biased, the draws are so a
    second time, and n examples of a class vary by (n - 1) / n too little. So the bias is taken off, the variance is
    widened by that and by the bias, which is known badly, and the interval always holds macro F1 itself. Where
    nothing is wrong, the draws do not vary, and Wilson's interval is that of accuracy.
    results/macro_f1_interval.py measures how often it holds the truth.
    """
    true, predicted, counts = _pairs(confusion)
    support, named, correct = _count_classes(true, predicted, counts, confusion.shape[0])
    total, f1 = float(counts.sum()), _mean_scores(support, named, correct)[1]
    members = float(1 / np.mean(1 / support[support > 0]))
    bias, std = float(drawn.mean()) - f1, float(drawn.std(ddof=1))
    if members < _MIN_MEMBERS or abs(bias) > 2 * std:  # a bias that large is known too badly to be taken off
        return None
    variance = std**2 * (1 + 1 / members) + bias**2
    low, high = _wilson(float(np.clip(f1 - bias, 0, 1)), min(f1 * (1 - f1) / variance, total) if variance else total)
    return [min(low, f1), max(high, f1)]


def _wilson(proportion: float, size: float) -> tuple[float, float]:
    """Wilson's score interval about a proportion of `size` examples."""
    from scipy.stats import norm

    square = float(norm.ppf(0.5 + LEVEL / 2)) ** 2 / size
    middle = (proportion + square / 2) / (1 + square)
    half = np.sqrt(square * (proportion * (1 - proportion) + square / 4)) / (1 + square)
    return float(max(middle - half, 0)), float(min(middle + half, 1))


def most_confused(confusion: Any, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Up to 10 pairs of true and predicted class that are confused most often, the most frequent first."""
    true, predicted, counts = _pairs(confusion)
    support = np.bincount(true, counts, len(class_names))
    wrong = np.flatnonzero(true != predicted)
    return [
        {
            "true": class_names[true[pair]],
            "predicted": class_names[predicted[pair]],
            "count": int(counts[pair]),
            "share": float(counts[pair] / support[true[pair]]),
        }
        for pair in wrong[np.argsort(-counts[wrong], kind="stable")][:_MAX_CONFUSED]
    ]


def percent(value: float | None) -> str:
    """`value`, 0 .. 1, in percent; '-' for None."""
    return "-" if value is None else f"{100 * value:.2f} %"


def without_examples(classes: list[dict[str, Any]]) -> str:
    """A remark for the end of a line on `classes` without test examples, which no score includes; "" if none."""
    names = [printable(each["name"]) for each in classes if not each["support"]]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" (without test examples: {', '.join(names[:_NAMED])}{more})" if names else ""


def summary(values: list[float]) -> dict[str, Any]:
    """A dict with mean, std (sample standard deviation; None for one value) and each."""
    with np.errstate(invalid="ignore"):  # of a loss that is infinite
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "each": list(values)}


def plot_curves(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and accuracy by epoch, see `History`."""
    with drawn(path, 10, 4) as figure:
        History(lines).draw(figure, ["loss", "accuracy"])
        if title:
            figure.suptitle(drawable(title))


def plot_confusion(matrix: Any, class_names: Sequence[str], path: Path, title: str) -> None:
    """Plot the confusion matrix [C, C], an array or a sparse matrix. Rows are true classes, colours fractions of a row.

    For more than 500 classes, neighbours are merged.
    """
    from scipy.sparse import coo_array

    pairs, count = coo_array(matrix), len(class_names)
    each = -(-count // _MAX_DRAWN_CLASSES)
    side = -(-count // each)
    matrix = coo_array((pairs.data, (pairs.row // each, pairs.col // each)), shape=(side, side)).toarray()
    size = float(np.clip(0.45 * count, 5, 16)) if count <= MAX_NUMBERED_CLASSES else 9.0
    with drawn(path, size + 1, size) as figure:
        axis = figure.subplots()
        fractions = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        extent = (-0.5, count - 0.5, count - 0.5, -0.5)
        image = axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1, extent=extent)
        figure.colorbar(image, ax=axis, label="fraction of the true class")
        axis.set_xlabel("predicted class")
        axis.set_ylabel("true class")
        axis.set_title(drawable(title))
        if len(class_names) <= MAX_NUMBERED_CLASSES:
            labels = [drawable(name) for name in class_names]
            # Names that are cut to the same text get numbers.
            labels = labels if len({*labels}) == len(labels) else [f"{i}: {label}" for i, label in enumerate(labels)]
            axis.set_xticks(range(len(labels)), labels, rotation=90)
            axis.set_yticks(range(len(labels)), labels)
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    colour = "white" if fractions[row, column] > 0.5 else "black"
                    axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)


def plot_mistakes(mistakes: Sequence[tuple[str, str, float, np.ndarray]], path: Path, title: str) -> None:
    """Plot a contact sheet of `mistakes` (see `pspinal_jax.runs.evaluate.Mistake`), unless there are none."""
    if not mistakes:
        return
    columns = min(6, len(mistakes))
    rows = -(-len(mistakes) // columns)
    with drawn(path, 1.9 * columns + 0.4, 2.25 * rows + 0.5) as figure:
        for axis in figure.subplots(rows, columns, squeeze=False).flat:
            axis.set_axis_off()
        for axis, (true, predicted, probability, picture) in zip(figure.axes, mistakes, strict=False):
            axis.imshow(picture[..., 0] if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=255)
            lines = true, f"as {predicted} {100 * probability:.0f} %"
            axis.set_title("\n".join(drawable(line, _MAX_CAPTION) for line in lines), fontsize=7)
        figure.suptitle(drawable(title))
