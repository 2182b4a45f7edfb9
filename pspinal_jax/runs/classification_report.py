"""From predictions to what they are worth: scores, intervals, scores by class, confusions; by scikit-learn.

Accuracy hides classes: of 90 % in one class, a model that knows no other has 90 %. Balanced accuracy is the mean of the
classes' recalls, macro F1 the mean of their F1, over the classes that have examples (K. Brodersen et al., "The balanced
accuracy and its posterior distribution", ICPR 2010). The calibration error is the expected one of C. Guo et al., "On
calibration of modern neural networks", ICML 2017: the gap between accuracy and confidence in bins of equal width,
weighted by their examples.
"""

import dataclasses
from typing import Any

import numpy as np

from pspinal_jax.errors import printable

CALIBRATION_BINS = 15
"""As Guo et al. have it."""
LEAST_CLASSES_FOR_TOP_5 = 6
LEVEL = 0.95
RESAMPLES = 1000
MOST_CONFUSED = 10
MOST_ROWS = 20
"""Lines of the table on screen."""
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a classifier says of N labelled examples.

    Attributes:
      labels: integers [N].
      predictions: integers [N], the most probable class.
      confidence: float64 [N], its probability.
      log_likelihood: float64 [N], the log-probability of the true class, nats.
      rank: integers [N], how many classes are named before the true one.
    """

    labels: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray
    log_likelihood: np.ndarray
    rank: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, log_probabilities: np.ndarray) -> "Scored":
        """Of labels [N] and log-probabilities [N, C]; among equal ones the first class is the most probable."""
        rows = np.arange(len(labels))
        predictions = log_probabilities.argmax(1)
        true = log_probabilities[rows, labels]
        before = np.arange(log_probabilities.shape[1]) < np.asarray(labels)[:, None]
        ahead = (log_probabilities > true[:, None]) | ((log_probabilities == true[:, None]) & before)
        return cls(np.asarray(labels), predictions, np.exp(log_probabilities[rows, predictions]), true, ahead.sum(1))

    @classmethod
    def joined(cls, parts: "list[Scored]") -> "Scored":
        """Of all `parts`, one after the other."""
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})

    def surest_mistakes(self, most: int) -> np.ndarray:
        """Indices of at most `most` wrong predictions, the most confident first."""
        wrong = np.flatnonzero(self.predictions != self.labels)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:most]


def scores_by_class(labels: np.ndarray, predictions: np.ndarray, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of each class name, support, precision, recall and f1; None where there is nothing to divide by."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        labels, predictions, labels=range(len(class_names)), average=None, zero_division=np.nan
    )
    precision, recall, f1, support = columns
    return [
        {
            "name": name,
            "support": int(support[index]),
            "precision": _plain(precision[index]),
            "recall": _plain(recall[index]),
            "f1": _plain(f1[index]),
        }
        for index, name in enumerate(class_names)
    ]


def _plain(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def averages(classes: list[dict[str, Any]]) -> dict[str, float]:
    """balanced_accuracy and macro_f1 of `scores_by_class`, over the classes with examples."""
    there = [each for each in classes if each["support"]]
    return {
        "balanced_accuracy": float(np.mean([each["recall"] for each in there])),
        "macro_f1": float(np.mean([each["f1"] for each in there])),
    }


def worst_first(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`classes` that have examples, by recall, then F1, then by how many examples are got wrong; then those without."""
    there = [each for each in classes if each["support"]]
    order = sorted(there, key=lambda each: (each["recall"], each["f1"], -each["support"]))
    return order + [each for each in classes if not each["support"]]


def classification_report(scored: Scored, class_names: tuple[str, ...]) -> dict[str, Any]:
    """All that evaluation.json says of `scored`.

    Returns:
      accuracy, balanced_accuracy, macro_f1 (0 .. 1), intervals of these (95 %, see `intervals`), top_5_accuracy (from
      six classes on), loss (the negative log-likelihood, nats), calibration_error (0 .. 1) and calibration_bins,
      correct, examples, classes (see `scores_by_class`), class_accuracy (recall by name), confusion [C, C], rows the
      true class, and most_confused, pairs with their count and its share of the true class.
    """
    labels, predictions, count = scored.labels, scored.predictions, len(scored.labels)
    confusion = np.zeros((len(class_names), len(class_names)), int)
    np.add.at(confusion, (labels, predictions), 1)
    classes = scores_by_class(labels, predictions, class_names)
    report = {
        "accuracy": float(np.diag(confusion).sum() / count),
        **averages(classes),
        "intervals": intervals(confusion),
        "correct": int(np.diag(confusion).sum()),
        "examples": count,
        "loss": float(-scored.log_likelihood.mean()),
        "calibration_error": calibration_error(scored.confidence, predictions == labels),
        "calibration_bins": CALIBRATION_BINS,
        "class_accuracy": {each["name"]: each["recall"] for each in classes},
        "classes": classes,
        "most_confused": most_confused(confusion, class_names),
        "confusion": confusion.tolist(),
    }
    if len(class_names) >= LEAST_CLASSES_FOR_TOP_5:
        report["top_5_accuracy"] = float((scored.rank < 5).mean())
    return report


def calibration_error(confidence: np.ndarray, hits: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """The expected calibration error: mean gap of accuracy and confidence in bins (k/B, (k+1)/B], by their examples.

    Args:
      confidence: [N], probability of the predicted class.
      hits: bool [N], whether it is the true one.
      bins: B.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=hits - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(hits))


def intervals(confusion: np.ndarray) -> dict[str, Any]:
    """95 % intervals over test examples, from the confusion matrix [C, C].

    accuracy: Wilson's score interval for a share. balanced_accuracy and macro_f1: the bootstrap's percentiles, of 1,000
    draws of as many examples with replacement (B. Efron, 1979), with seed 0. They tell how another test set of this
    size might have come out, not how another training would have.
    """
    from scipy.sparse import csr_array
    from scipy.stats import binomtest

    total = int(confusion.sum())
    wilson = binomtest(int(np.trace(confusion)), total).proportion_ci(LEVEL, method="wilson")
    true, predicted = np.nonzero(confusion)
    drawn = np.random.default_rng(0).multinomial(total, confusion[true, predicted] / total, RESAMPLES)

    def sums(groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """[R, C]: the sums of the counts [R, M] by group [M]."""
        member = csr_array(
            (np.ones(len(groups), int), (np.arange(len(groups)), groups)), shape=(len(groups), len(confusion))
        )
        return np.asarray(counts @ member)

    support, named = sums(true, drawn), sums(predicted, drawn)
    hits = sums(true[true == predicted], drawn[:, true == predicted])
    there = support > 0
    recall = np.where(there, hits / np.maximum(support, 1), 0).sum(1) / there.sum(1)
    f1 = np.where(there, 2 * hits / np.maximum(support + named, 1), 0).sum(1) / there.sum(1)
    ends = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    return {
        "level": LEVEL,
        "accuracy": [float(wilson.low), float(wilson.high)],
        "balanced_accuracy": np.percentile(recall, ends).tolist(),
        "macro_f1": np.percentile(f1, ends).tolist(),
        "method": "accuracy by Wilson's score interval, balanced accuracy and macro F1 by the bootstrap "
        f"({RESAMPLES:,} draws of the test examples)",
    }


def most_confused(confusion: np.ndarray, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The pairs of a true and a predicted class that are most often confused, at most 10, the most frequent first."""
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSED]
    pairs = [divmod(int(place), len(confusion)) for place in order]
    return [
        {
            "true": class_names[true],
            "predicted": class_names[predicted],
            "count": int(wrong[true, predicted]),
            "share": float(wrong[true, predicted] / confusion[true].sum()),
        }
        for true, predicted in pairs
        if wrong[true, predicted]
    ]


def describe_report(report: dict[str, Any]) -> list[str]:
    """The lines of `classification_report` for the screen: the scores, classes worst first, what is confused."""
    low, high = report["intervals"]["accuracy"]
    lines = [
        f"test accuracy {percent(report['accuracy'])} ({report['correct']} of {report['examples']}; "
        f"95 % interval {100 * low:.2f} to {100 * high:.2f})",
        f"balanced accuracy {percent(report['balanced_accuracy'])}{without_examples(report['classes'])}, "
        f"macro F1 {percent(report['macro_f1'])}",
    ]
    if "top_5_accuracy" in report:
        lines[1] += f", top-5 accuracy {percent(report['top_5_accuracy'])}"
    lines.append(
        f"negative log-likelihood {report['loss']:.4f} nats, calibration error {percent(report['calibration_error'])} "
        f"({report['calibration_bins']} bins)"
    )
    lines += class_table(report["classes"])
    if report["most_confused"]:
        named = [
            f"{printable(each['true'])} taken for {printable(each['predicted'])} {each['count']} times"
            for each in report["most_confused"][:3]
        ]
        lines.append(f"most often: {'; '.join(named)}")
    return lines


def without_examples(classes: list[dict[str, Any]]) -> str:
    """Which of `classes` have no test example and count nowhere, for the end of a line; nothing where all have some."""
    names = [printable(each["name"]) for each in classes if not each["support"]]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" (without test examples: {', '.join(names[:_NAMED])}{more})" if names else ""


def class_table(classes: list[dict[str, Any]], most: int = MOST_ROWS) -> list[str]:
    """A table of `scores_by_class`, the worst first and at most `most` of them, and how many are left out."""
    shown = worst_first(classes)[:most]
    rows: list[tuple[str, ...]] = [("class, worst first", "examples", "precision", "recall", "F1")]
    for each in shown:
        scores = [percent(each[name]) for name in ("precision", "recall", "f1")]
        rows.append((printable(each["name"]), str(each["support"]), *scores))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for name, *cells in rows
    ]
    left = len(classes) - len(shown)
    return [f"  {line}" for line in lines] + ([f"  and {left} more classes"] if left else [])


def percent(value: float | None) -> str:
    """`value`, 0 .. 1, in percent; '-' for None."""
    return "-" if value is None else f"{100 * value:.2f} %"
