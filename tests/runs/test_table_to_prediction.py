"""A table of features with labels of text, from training to predictions, by names of columns and classes."""

import json

import numpy as np
import pytest

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.errors import DataError, UsageError

pd = pytest.importorskip("pandas")

NAMES = np.array(["cat", "cow", "dog"])


def make_frame():
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    frame = pd.DataFrame(np.eye(3, 4)[labels] * 4 + rng.normal(size=(90, 4)), columns=list("abcd"))
    return frame.assign(species=NAMES[labels])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("table")
    make_frame().to_csv(place / "data.csv", index=False)
    small = {"epochs": 4, "batch_size": 8, "model__layer_width": 4, "data__num_validation": 0}
    return pspinal_jax.train("features", data__path=place / "data.csv", workdir=place / "run", **small)


def test_run_on_a_table_knows_its_classes_and_columns(run):
    assert run.class_names == tuple(NAMES) and run.config["columns"] == list("abcd")
    assert run.result["test_examples"] == 18


def test_evaluate_finds_the_runs_classes_in_tables_that_lack_some(run, tmp_path):
    own = run.evaluate()
    assert own["trained_on_it"] and own["correct"] == round(own["accuracy"] * 18)
    frame = make_frame()
    frame[frame.species != "cat"].to_parquet(tmp_path / "less.parquet")
    other = run.evaluate(tmp_path / "less.parquet")
    assert other["classes"][0]["support"] == 0 and other["trained_on_it"] is False
    frame[["b", "a", "c", "d", "species"]].to_csv(tmp_path / "order.csv", index=False)
    with pytest.raises(UsageError, match=r"has the columns b, .*, but the run was trained on a, "):
        run.evaluate(tmp_path / "order.csv")
    frame.assign(species="emu").to_csv(tmp_path / "emu.csv", index=False)
    with pytest.raises(DataError, match="labels hold emu, expected one of the classes cat, cow, dog"):
        run.evaluate(tmp_path / "emu.csv")


def test_predict_takes_frames_arrays_and_tables_by_the_names_of_columns(run, tmp_path, capsys):
    frame = make_frame()
    found = run.predict(frame[list("abcd")].to_numpy())
    assert len(found) == 90 and found[0].path is None and found[0].classes[0][0] in NAMES
    assert run.predict(frame[["species", *"dcba"]]) == found
    frame.to_csv(tmp_path / "new.csv")
    assert [each.classes for each in run.predict(tmp_path / "new.csv")] == [each.classes for each in found]
    assert main(["predict", str(run.path), str(tmp_path / "new.csv"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)[7]["image"] == f"{tmp_path / 'new.csv'}:7" and "90 of 90 rows classified" in said.err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (make_frame().drop(columns="c"), "lacks columns on which the run was trained: c"),
        (make_frame().assign(b="x"), "column 'b' of the features holds"),
        (make_frame().assign(b=[np.nan] * 90), "column 'b' of the features lacks 90 of 90"),
        (np.ma.masked_array(np.zeros((2, 4)), np.eye(2, 4)), "2 of 8 cells of the features are masked"),
        (np.zeros((2, 3)), "has shape [2, 3], but the run was trained on 4 features"),
    ],
)
def test_features_to_predict_from_that_do_not_fit_are_refused(run, rows, message):
    with pytest.raises(DataError) as caught:
        run.predict(rows)
    assert message in str(caught.value)


def test_pictures_are_no_features(run):
    with pytest.raises(UsageError, match=r"cat\.png is not a table .* was trained on features, not on images"):
        run.predict(["cat.png"])


def test_export_of_a_run_on_a_table_knows_its_columns(run, tmp_path):
    from pspinal_jax.runs.predict import predict

    frame = make_frame()[["species", *"dcba"]]
    exported = predict(run.export(tmp_path / "export"), frame)
    assert [each.classes[0][0] for each in exported] == [each.classes[0][0] for each in run.predict(frame)]
