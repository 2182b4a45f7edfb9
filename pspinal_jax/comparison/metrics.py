"""The scores that rows are compared by, each as what every test example adds to it."""

from typing import NamedTuple

import numpy as np

from pspinal_jax.comparison.answers import Answers
from pspinal_jax.comparison.settings import Metric
from pspinal_jax.runs.scores import CALIBRATION_BINS


class Display(NamedTuple):
    """How a metric is shown.

    Attributes:
      name: in words.
      unit: of values; differences of percentages are points.
      scale: what values are multiplied with.
      digits: after the point.
      better: 1 where more is better, -1 where less is.
      of_one_example: by how many T-ths a test example that is got right or wrong changes it; 0 where by any amount.
    """

    name: str
    unit: str = "%"
    scale: float = 100.0
    digits: int = 2
    better: int = 1
    of_one_example: int = 1

    def shown(self, value: float, sign: str = "") -> str:
        """A value as text; with "+" as `sign`, with its sign."""
        return f"{round(self.scale * value, self.digits) + 0.0:{sign}.{self.digits}f}"  # + 0.0: of -0.0 makes 0.0

    @property
    def points(self) -> str:
        """The unit of differences."""
        return "points" if self.unit == "%" else self.unit


DISPLAYS: dict[Metric, Display] = {
    "accuracy": Display("accuracy"),
    "macro_f1": Display("macro F1"),
    "balanced_accuracy": Display("balanced accuracy"),
    "log_likelihood": Display("log-likelihood", "nats", 1.0, 4, of_one_example=0),
    "calibration_error": Display("calibration error", better=-1, of_one_example=0),
}


def by_example(metric: Metric, answers: Answers) -> np.ndarray:
    """float64 [K, S, T] whose means over T are the metric.

    Accuracy and log-likelihood are means as they are. Of the others each value is the metric plus the derivative by
    the example's weight (its influence), so that the variance of their mean is the metric's, to first order.
    """
    if metric == "accuracy":
        return answers.correct.astype(np.float64)
    # Earlier versions recorded accuracy alone, and `Comparer` refuses other metrics of theirs.
    assert answers.predicted is not None and answers.log_likelihood is not None and answers.confidence is not None
    if metric == "log_likelihood":
        return answers.log_likelihood.astype(np.float64)
    if metric == "calibration_error":
        gaps = answers.correct - answers.confidence.astype(np.float64)
        bins = np.clip(np.ceil(answers.confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
        return np.stack(
            [[_calibration(*each) for each in zip(*of, strict=True)] for of in zip(bins, gaps, strict=True)]
        )
    pairs = zip(answers.labels, answers.predicted, strict=True)
    return np.stack([[_of_classes(metric, labels, each) for each in predicted] for labels, predicted in pairs])


def _calibration(bins: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Of one training, from bins [T] and accuracy minus confidence [T]: see `runs.scores.calibration_error`."""
    return np.sign(np.bincount(bins, gaps, CALIBRATION_BINS))[bins] * gaps


def _of_classes(metric: Metric, labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Balanced accuracy or macro F1 of one training, over the classes with examples, from classes int [T]."""
    count = int(max(labels.max(), predicted.max())) + 1
    correct = labels == predicted
    support, named = np.bincount(labels, minlength=count), np.bincount(predicted, minlength=count)
    right, present = np.bincount(labels, correct, count), support > 0
    if metric == "balanced_accuracy":
        score = right / np.maximum(support, 1)
        influence = (correct - score[labels]) / support[labels]
    else:
        whole = np.maximum(support + named, 1)
        score = 2 * right / whole
        influence = (2 * correct - score[labels]) / whole[labels] - (present * score / whole)[predicted]
    return score[present].mean() + influence * len(labels) / present.sum()
