"""`HeadClassifier` is a scikit-learn classifier like any other."""

import pickle

import jax
import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import check_estimator

from pspinal_jax.sklearn import HeadClassifier

X, Y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]
SMALL = {"layer_width": 8, "num_layers": 2, "epochs": 30, "learning_rate": 0.02, "random_state": 0}
EXPECTED_TO_FAIL = {
    "check_sample_weight_equivalence_on_dense_data": "training is stochastic: which examples share a batch, and how "
    "many steps there are, depends on their number; as for scikit-learn's MLPClassifier"
}


@pytest.mark.slow
@pytest.mark.parametrize("head", ["dense", "progressive"])
def test_check_estimator(head):
    classifier = HeadClassifier(head, layer_width=16, num_layers=2, epochs=20, learning_rate=0.02)
    results = check_estimator(classifier, expected_failed_checks=EXPECTED_TO_FAIL, on_skip=None)
    assert {each["check_name"] for each in results if each["status"] == "xfail"} == set(EXPECTED_TO_FAIL)


@pytest.fixture(scope="module")
def fitted():
    return HeadClassifier(**SMALL).fit(X, NAMES)


def test_head_classifier_learns_names_of_classes(fitted):
    assert fitted.classes_.tolist() == ["setosa", "versicolor", "virginica"] and fitted.n_features_in_ == 4
    assert fitted.score(X, NAMES) > 0.93 and fitted.loss_curve_[-1] < fitted.loss_curve_[0]
    np.testing.assert_allclose(fitted.predict_proba(X).sum(1), 1)
    assert (fitted.predict(X) == fitted.classes_[fitted.predict_proba(X).argmax(1)]).all()


def test_head_classifier_is_pickled(fitted):
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))


def test_head_classifier_refits_without_compiling(fitted):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: compiled.append(event))
    try:
        changed = {**SMALL, "learning_rate": 0.01, "epochs": 4, "random_state": 5}
        HeadClassifier(**changed).fit(X[::-1] + 1, NAMES[::-1]).predict(X[:7])
        assert not [event for event in compiled if "backend_compile" in event]
        HeadClassifier(**SMALL | {"layer_width": 9}).fit(X, NAMES)
        assert [event for event in compiled if "backend_compile" in event]
    finally:
        jax.monitoring.clear_event_listeners()


def test_head_classifier_sample_weight_zero_leaves_an_example_out():
    weights = np.where(Y == 1, 0.0, 1.0)
    fitted = HeadClassifier(**SMALL).fit(X, NAMES, sample_weight=weights)
    assert (fitted.predict(X) != "versicolor").all()
    with pytest.raises(ValueError, match="zero"):
        HeadClassifier(**SMALL).fit(X, NAMES, sample_weight=0 * weights)


def test_head_classifier_in_a_pipeline():
    pipeline = make_pipeline(MinMaxScaler(), HeadClassifier(**SMALL))
    assert pipeline.fit(X, NAMES).score(X, NAMES) > 0.93


def test_head_classifier_in_a_grid_search():
    search = GridSearchCV(HeadClassifier(**SMALL), {"learning_rate": [1e-6, 0.02]}, cv=2).fit(X, NAMES)
    assert search.best_params_ == {"learning_rate": 0.02} and search.best_score_ > 0.9


def test_head_classifier_calibrated():
    calibrated = CalibratedClassifierCV(HeadClassifier(**SMALL), cv=2).fit(X, NAMES)
    assert calibrated.score(X, NAMES) > 0.9


def test_head_classifier_names_a_wrong_head():
    with pytest.raises(ValueError, match="head is 'transformer', expected progressive"):
        HeadClassifier("transformer").fit(X, Y)
