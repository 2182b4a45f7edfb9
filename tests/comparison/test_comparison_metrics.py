"""Metrics of rows: each is the mean of what test examples add, and varies as much."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from pspinal_jax.comparison.answers import Answers
from pspinal_jax.comparison.metrics import DISPLAYS, by_example
from pspinal_jax.runs.scores import calibration_error


def draw(rng, examples=60, classes=4, splits=2, seeds=3):
    """Answers that are right more often than not, and of which class 3 is rare and class 4 only named."""
    labels = rng.choice(classes, (splits, examples), p=[0.4, 0.3, 0.25, 0.05])
    wrong = rng.integers(0, classes + 1, (splits, seeds, examples))
    predicted = np.where(rng.random(wrong.shape) < 0.6, labels[:, None], wrong)
    log, confidence = rng.normal(-1, 0.3, wrong.shape), rng.uniform(0.3, 1, wrong.shape)
    return Answers(labels, predicted == labels[:, None], predicted, log.astype(np.float32), confidence.astype("f4"))


def test_every_metric_is_the_mean_over_test_examples():
    answers = draw(np.random.default_rng(0))
    means = {metric: by_example(metric, answers).mean(-1) for metric in DISPLAYS}
    for split, seed in np.ndindex(2, 3):
        labels, predicted = answers.labels[split], answers.predicted[split, seed]
        right, confidence = predicted == labels, answers.confidence[split, seed].astype(float)
        with np.errstate(all="ignore"):
            expected = {
                "accuracy": right.mean(),
                "macro_f1": f1_score(labels, predicted, average="macro", labels=np.unique(labels)),
                "balanced_accuracy": np.mean([right[labels == label].mean() for label in np.unique(labels)]),
                "log_likelihood": answers.log_likelihood[split, seed].mean(),
                "calibration_error": calibration_error(confidence, right),
            }
        assert expected.keys() == DISPLAYS.keys()
        for metric, value in expected.items():
            np.testing.assert_allclose(means[metric][split, seed], value, rtol=1e-6, err_msg=metric)
    assert balanced_accuracy_score([0, 1, 1], [0, 1, 0]) == pytest.approx(
        by_example("balanced_accuracy", Answers(np.array([[0, 1, 1]]), None, np.array([[[0, 1, 0]]]), 0, 0)).mean()
    )


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy", "calibration_error"])
def test_the_spread_over_examples_is_the_metrics(metric):
    """Of new test sets of the same kind: as much as one of them says by its examples."""
    rng = np.random.default_rng(1)
    found = by_example(metric, draw(rng, examples=2000, splits=300, seeds=1))[:, 0]
    told = found.std(1, ddof=1) / np.sqrt(found.shape[1])
    assert found.mean(1).std() == pytest.approx(np.median(told), rel=0.12)
