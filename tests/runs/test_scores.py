"""Scores of predictions: against their definitions, on cases worked out by hand."""

import numpy as np
import pytest
from scipy.sparse import coo_array
from sklearn.metrics import precision_recall_fscore_support

from pspinal_jax.runs.report import describe_scores
from pspinal_jax.runs.scores import (
    Scored,
    bootstrap,
    calibration_error,
    intervals,
    most_confused,
    score_report,
    scores_by_class,
    without_examples,
    worst_first,
)

NAMES = ("a", "b", "never there")


def scored(labels, rows):
    return Scored.of(np.array(labels), np.log(np.array(rows, float)))


@pytest.fixture
def report():
    """Nine of a, one of b, which is taken for a; nothing of the third class, which is named once."""
    rows = [[0.8, 0.1, 0.1]] * 8 + [[0.3, 0.1, 0.6]] + [[0.7, 0.2, 0.1]]
    return score_report(scored([0] * 9 + [1], rows), NAMES)


def test_a_class_that_is_never_found_halves_balanced_accuracy_and_not_accuracy(report):
    assert (report["accuracy"], report["correct"], report["examples"]) == (0.8, 8, 10)
    assert report["balanced_accuracy"] == pytest.approx((8 / 9 + 0) / 2)
    assert report["macro_f1"] == pytest.approx((2 * 8 / (9 + 9) + 0) / 2)
    assert report["loss"] == pytest.approx(-(8 * np.log(0.8) + np.log(0.3) + np.log(0.2)) / 10)
    assert report["calibration_error"] == pytest.approx((8 * 0.2 + 0.6 + 0.7) / 10)
    assert report["confusion"] == [[8, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert report["class_accuracy"] == {"a": pytest.approx(8 / 9), "b": 0.0, "never there": None}
    a, b, never = report["classes"]
    assert (a["support"], a["precision"], a["f1"]) == (9, pytest.approx(8 / 9), pytest.approx(8 / 9))
    assert (b["precision"], b["recall"], b["f1"]) == (None, 0.0, 0.0)
    assert (never["support"], never["precision"], never["recall"]) == (0, 0.0, None)
    assert [each["name"] for each in worst_first(report["classes"])] == ["b", "a", "never there"]
    assert "top_5_accuracy" not in report


def test_pairs_that_are_confused_come_with_their_share_of_the_true_class(report):
    first, second = report["most_confused"]
    assert first == {"true": "a", "predicted": "never there", "count": 1, "share": pytest.approx(1 / 9)}
    assert (second["true"], second["predicted"], second["share"]) == ("b", "a", 1.0)


def test_calibration_error_is_the_mean_gap_in_bins():
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    hits = np.array([True, True, True, False])
    assert calibration_error(confidence, hits, bins=10) == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)
    # In one bin the gaps of the two halves cancel or add up.
    assert calibration_error(confidence, hits, bins=1) == pytest.approx(abs(3 / 4 - 0.75))
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0.0


def test_a_confidence_on_a_bins_edge_belongs_to_the_bin_below():
    """Bins are (k/B, (k+1)/B], and the first holds 0 too."""
    apart = calibration_error(np.array([0.5, 0.75]), np.array([True, False]), bins=2)
    assert apart == (abs(1 - 0.5) + abs(0 - 0.75)) / 2
    together = calibration_error(np.array([0.75, 1.0]), np.array([False, True]), bins=2)
    assert together == abs(1 - 1.75) / 2
    assert calibration_error(np.array([0.0, 0.5]), np.array([False, True]), bins=2) == abs(1 - 0.5) / 2


def test_top_5_counts_examples_whose_class_is_among_the_first_five():
    rows = np.tile([0.3, 0.25, 0.2, 0.1, 0.08, 0.07], (6, 1))
    assert score_report(scored(range(6), rows), tuple("abcdef"))["top_5_accuracy"] == pytest.approx(5 / 6)
    assert scored(range(6), np.full((6, 6), 1 / 6)).rank.tolist() == [0, 1, 2, 3, 4, 5], "equal ones, by their number"


def test_the_intervals_hold_the_scores_and_narrow_with_more_examples(report):
    few, many = intervals(np.array(report["confusion"])), intervals(100 * np.array(report["confusion"]))
    for name in ("accuracy", "balanced_accuracy"):
        low, high = many[name]
        assert low <= report[name] <= high and high - low < few[name][1] - few[name][0]
    # Wilson, of 8 in 10 (E. Wilson, 1927).
    assert few["accuracy"] == pytest.approx([0.4902, 0.9433], abs=5e-4)
    assert intervals(np.array(report["confusion"])) == few


@pytest.mark.parametrize("score", ["balanced_accuracy", "macro_f1"])
def test_the_bootstraps_interval_is_what_drawing_examples_one_by_one_gives(score):
    confusion = np.array([[30, 10, 0], [5, 12, 3], [2, 0, 1]])
    labels, predictions = (np.repeat(places, confusion[np.nonzero(confusion)]) for places in np.nonzero(confusion))
    rng, found = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = rng.integers(63, size=63)
        table = np.zeros((3, 3))
        np.add.at(table, (labels[drawn], predictions[drawn]), 1)
        with np.errstate(invalid="ignore"):
            recall, f1 = np.diag(table) / table.sum(1), 2 * np.diag(table) / (table.sum(0) + table.sum(1))
        there = table.sum(1) > 0
        found.append((recall if score == "balanced_accuracy" else f1)[there].mean())
    # 1,000 draws know an end to 0.01, and the ends of 90 and of 99 % lie 0.03 and more away.
    ours = np.quantile(bootstrap(confusion)[score == "macro_f1"], [0.025, 0.975])
    np.testing.assert_allclose(ours, np.quantile(found, [0.025, 0.975]), atol=0.012)
    if score == "balanced_accuracy":
        assert intervals(confusion)[score] == pytest.approx(ours)
    assert np.diff(np.quantile(found, [0.025, 0.05, 0.95, 0.975]))[[0, 2]].min() > 0.015


def test_macro_f1s_interval_holds_the_truth_of_small_classes():
    """Of 100 classes of 5, where the bootstrap's percentiles hold it in half of the test sets."""
    rng, classes = np.random.default_rng(0), 100
    rows = 0.6 * np.eye(classes) + 0.4 * np.roll(np.eye(classes), 1, axis=1)
    held = 0
    for _ in range(24):
        confusion = np.stack([rng.multinomial(5, row) for row in rows])
        low, high = intervals(confusion)["macro_f1"]
        held += low <= 0.6 <= high and high - low < 0.15
    assert held >= 22


def test_macro_f1s_interval_is_accuracys_where_nothing_is_wrong():
    found = intervals(np.diag([20, 20]))
    assert found["macro_f1"] == pytest.approx(found["accuracy"]) and found["macro_f1"][0] < 0.92


def test_macro_f1s_interval_is_left_out_with_the_reason_where_classes_are_too_small(report):
    found = report["intervals"]
    assert found["macro_f1"] is None and "none for macro F1, as most classes have too few examples" in found["method"]
    assert intervals(np.diag([3, 3, 3]))["macro_f1"] is None and intervals(np.diag([4, 4, 4]))["macro_f1"]


def test_sparse_and_dense_confusions_give_the_same():
    confusion = np.random.default_rng(0).multinomial(90, np.full(9, 1 / 9)).reshape(3, 3)
    assert intervals(coo_array(confusion)) == intervals(confusion)
    assert most_confused(coo_array(confusion), tuple("abc")) == most_confused(confusion, tuple("abc"))


def test_confusions_of_more_than_a_thousand_classes_are_listed():
    labels = np.arange(1001)
    made = Scored(labels, np.where(labels < 2, 1, labels), np.ones(1001), np.zeros(1001), np.zeros(1001, int))
    report = score_report(made, tuple(map(str, labels)))
    assert report["confusion"] is None and report["confusion_counts"][:3] == [[0, 1, 1], [1, 1, 1], [2, 2, 1]]
    assert report["correct"] == 1000 and report["most_confused"] == [
        {"true": "0", "predicted": "1", "count": 1, "share": 1.0}
    ]


def test_scores_by_class_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 6, 40), rng.integers(1, 7, 40)
    expected = precision_recall_fscore_support(labels, predictions, labels=range(8), average=None, zero_division=np.nan)
    found = scores_by_class(labels, predictions, tuple("abcdefgh"))
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [each[name] for each in found] == [None if np.isnan(value) else value for value in column]


def test_the_table_has_at_most_twenty_classes_worst_first(report):
    classes = [
        {"name": f"c{index}", "support": 4, "precision": 1.0, "recall": index / 30, "f1": index / 30}
        for index in range(29, -1, -1)
    ]
    lines = describe_scores(report | {"classes": classes, "most_confused": []})[3:]
    assert len(lines) == 22 and lines[1].split()[:2] == ["c0", "4"] and lines[20].split()[0] == "c19"
    assert lines[-1] == "  and 10 more classes"


def test_what_is_said_is_what_was_found(report):
    said = "\n".join(describe_scores(report))
    assert "test accuracy 80.00 % (8 of 10; 95 % interval 49.02 to 94.33)" in said
    assert "balanced accuracy 44.44 %" in said and "(15 bins)" in said
    assert "a taken for never there 1 times" in said


def test_the_surest_mistakes_come_first():
    found = scored([0, 0, 0], [[0.4, 0.6], [0.9, 0.1], [0.1, 0.9]]).surest_mistakes(5)
    assert found.tolist() == [2, 0]


def test_classes_without_examples_are_named_beside_balanced_accuracy(report):
    assert " % (without test examples: never there), macro F1" in describe_scores(report)[1]
    classes = [{"name": f"c{index}\x1b", "support": 0} for index in range(5)]
    assert without_examples(classes) == r" (without test examples: c0\x1b, c1\x1b, c2\x1b and 2 more)"
    assert without_examples(classes[:4]).endswith("c2\\x1b and 1 more)")
    assert without_examples(classes[:3]) == r" (without test examples: c0\x1b, c1\x1b, c2\x1b)"
    assert without_examples([{"name": "a", "support": 1}]) == ""


def test_the_ten_pairs_that_are_confused_most_are_listed():
    confusion = np.diag(np.full(6, 9))
    confusion[0, 1:] = [5, 4, 3, 2, 1]
    confusion[1:, 0] = [10, 9, 8, 7, 6]
    confusion[2, 3] = 11
    counts = [each["count"] for each in most_confused(confusion, tuple("abcdef"))]
    assert counts == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2]


def test_the_bootstrap_draws_a_thousand_times():
    balanced, macro = bootstrap(np.array([[30, 10, 0], [5, 12, 3], [2, 0, 1]]))
    assert balanced.shape == macro.shape == (1000,) and len(np.unique(balanced)) > 500
