"""Labels and tables as people have them: what is taken, as what, and what is refused by name."""

import builtins

import numpy as np
import pytest

import pspinal_jax
from pspinal_jax.data.dataset import cut_test
from pspinal_jax.data.load import read_file
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.tables import make_dataset, read_rows
from pspinal_jax.errors import DataError, UsageError

LABELS = np.arange(30) % 3
FEATURES = np.random.default_rng(0).normal(size=(30, 4))
NAMES = np.array(["cat", "cow", "dog"])


def made(labels=LABELS, inputs=FEATURES, classes=None, class_names=None, **splits):
    return make_dataset({"train": (inputs, labels), **splits}, "data", classes, class_names)


def refused(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        made(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (NAMES[LABELS], ("cat", "cow", "dog")),
        (NAMES[LABELS].astype("S"), ("cat", "cow", "dog")),
        (NAMES[LABELS].tolist(), ("cat", "cow", "dog")),
        (NAMES[LABELS].astype(object), ("cat", "cow", "dog")),
        (NAMES[LABELS][:, None], ("cat", "cow", "dog")),
        (LABELS + 1, ("1", "2", "3")),
        (LABELS - 1, ("-1", "0", "1")),
        (np.array([2, 5, 900])[LABELS], ("2", "5", "900")),
        (np.array([10001, 20002, 94305])[LABELS], ("10001", "20002", "94305")),
        (LABELS.astype(float), ("0", "1", "2")),
        (LABELS.tolist(), ("0", "1", "2")),
        (np.ma.masked_array(LABELS, False), ("0", "1", "2")),
    ],
)
def test_labels_become_classes_without_phantoms(labels, names):
    data = made(labels)
    assert data.class_names == names
    assert data.train.labels.dtype == np.int32
    np.testing.assert_array_equal(data.train.labels, LABELS)


def test_booleans_are_two_classes_and_numbers_of_given_names():
    assert made(LABELS == 0).class_names == ("False", "True")
    data = made(LABELS == 0, class_names=("no", "yes"))
    assert data.class_names == ("no", "yes") and data.train.labels[:2].tolist() == [1, 0]


def test_labels_that_are_renumbered_are_said_in_one_line(capfd):
    made(LABELS)
    made(NAMES[LABELS])
    assert capfd.readouterr().err == ""
    made(LABELS + 1)
    assert capfd.readouterr().err == "data: labels 1 .. 3 are 3 classes, named 1, 2, 3\n"


def test_given_class_names_and_numbers_hold():
    """Labels that are numbers of the classes asked for stay so, though some have no example."""
    assert made(LABELS, classes=7).num_classes == 7
    assert made(LABELS + 1, classes=7).train.labels.max() == 3
    assert made(LABELS + 1, classes=3).class_names == ("1", "2", "3")
    assert made(LABELS + 1, class_names=("a", "b", "c")).train.labels.max() == 2
    assert made(NAMES[LABELS], class_names=("dog", "cow", "cat")).train.labels[:3].tolist() == [2, 1, 0]
    assert "go from 1 to 3, expected 0 .. 1" in refused(LABELS + 1, classes=2)
    assert "the labels name 3 classes, but data.num_classes is 4" in refused(NAMES[LABELS], classes=4)
    assert "labels hold cow" in refused(NAMES[LABELS], class_names=("dog", "cat"))


def test_a_runs_classes_are_found_by_name():
    """A later table of the same run may lack some of its classes."""
    known = ("-1", "1", "4")
    assert made(np.where(LABELS, 4, -1), classes=known).train.labels[:2].tolist() == [0, 2]
    assert made(np.where(LABELS, 4, -1), classes=known).class_names == known
    assert "labels hold 3, expected one of the classes -1, 1, 4" in refused(np.where(LABELS, 3, 1), classes=known)


def test_a_class_that_only_other_splits_hold_is_refused():
    test = (FEATURES[:3], NAMES[:3])
    assert "test has classes of which train has no example: dog" in refused(np.where(LABELS, "cat", "cow"), test=test)
    assert "go from 0 to 2, expected 0 .. 1" in refused(LABELS % 2, test=(FEATURES[:3], LABELS[:3]))
    assert "all train_labels are '0'" in refused(0 * LABELS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.ma.masked_array(LABELS, LABELS == 1), "labels are masked, the first in row"),
        ([np.ma.masked, *LABELS[1:]], "labels are masked"),
        (np.where(LABELS == 2, np.nan, LABELS), "10 of 30 labels are missing"),
        (np.where(LABELS == 2, None, NAMES[LABELS]), "10 of 30 labels are missing"),
        (
            ["cat", float("nan"), *NAMES[LABELS[2:]]],
            "are missing (NaN, None or empty), the first in row 1",
        ),
        (np.array(["cat", np.nan, *NAMES[LABELS[2:]]]), "1 of 30 labels are missing"),
        (np.where(LABELS == 2, " ", NAMES[LABELS]), "10 of 30 labels are missing"),
        (np.array(["cat", 3, *NAMES[LABELS[2:]]], object), "train_labels hold int and str"),
        (LABELS + 0.5, "hold 0.5, expected integers or text"),
        (np.eye(3)[LABELS], "shape (30, 3), expected one label an example"),
        (LABELS.astype("M8[D]"), "dtype datetime64[D]"),
        (np.array([b"\xff", *[b"a"] * 29], object), "not UTF-8"),
        (LABELS[1:], "30 examples but 29 labels"),
        (np.array([3000, *LABELS[1:]]), "train_labels go up to 3000, with 30 examples, of which one has it"),
    ],
)
def test_labels_that_are_missing_or_mean_nothing_are_refused(labels, message):
    assert message in refused(labels)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.ma.masked_array(FEATURES, FEATURES > 2), "1 of 120 cells of the features are masked"),
        ([np.ma.masked_array(row, row > 2) for row in FEATURES], "cells of the features are masked"),
        (FEATURES.astype(str), "column '0' of the features holds"),
        (np.where(FEATURES > 2, None, FEATURES), "lacks 1 of 30 values (NaN"),
        ([[1.0, 2.0]] * 29 + [[1.0]], "the cells of the features are not an array"),
        (np.zeros((30, 2, 2), int), "expected uint8 images"),
        (None, "inputs have shape ()"),
    ],
)
def test_features_that_are_missing_or_no_numbers_are_refused(inputs, message):
    assert message in refused(inputs=inputs)


def test_integers_in_two_dimensions_are_features():
    whole = np.round(FEATURES * 9).astype(int)
    data = made(inputs=whole)
    assert data.example_dtype == np.float32
    np.testing.assert_array_equal(data.train.inputs, whole)


@pytest.mark.parametrize("library", ["pandas", "polars"])
class TestFrames:
    def test_columns_are_features_and_a_series_is_labels(self, library):
        library = pytest.importorskip(library)
        frame = library.DataFrame({"a": FEATURES[:, 0], "b": LABELS, "c": LABELS > 0})
        for labels in (library.Series(NAMES[LABELS].tolist()), library.DataFrame({"y": NAMES[LABELS].tolist()})):
            data = made(labels, frame)
            assert data.class_names == ("cat", "cow", "dog")
            expected = np.column_stack([FEATURES[:, 0], LABELS, LABELS > 0]).astype(np.float32)
            np.testing.assert_array_equal(data.train.inputs, expected)

    def test_columns_of_text_or_with_holes_are_named(self, library):
        library = pytest.importorskip(library)
        text = library.DataFrame({"a": FEATURES[:, 0], "colour": NAMES[LABELS].tolist()})
        assert "column 'colour' of the features holds 'cat'" in refused(inputs=text)
        holes = library.DataFrame({"a": FEATURES[:, 0], "age": [None, *LABELS[1:].tolist()]})
        assert "column 'age' of the features lacks 1 of 30 values" in refused(inputs=holes)
        labels = library.Series([None, *NAMES[LABELS[1:]].tolist()])
        assert "1 of 30 labels are missing" in refused(labels)

    def test_frames_of_other_columns_are_refused(self, library):
        library = pytest.importorskip(library)
        first, other = (library.DataFrame(dict(zip(names, FEATURES.T, strict=True))) for names in ("abcd", "abdc"))
        message = refused(inputs=first, test=(other, LABELS))
        assert "test has the columns ('a', 'b', 'd', 'c'), expected those of train, ('a', 'b', 'c', 'd')" in message


def test_pandas_own_kinds_of_missing_and_of_labels_are_known():
    pd = pytest.importorskip("pandas")
    assert made(pd.Categorical(NAMES[LABELS], ["dog", "cow", "cat", "emu"])).class_names == ("cat", "cow", "dog")
    assert made(pd.Series(LABELS + 1, dtype="Int64")).class_names == ("1", "2", "3")
    assert "1 of 30 labels are missing" in refused(pd.Series([pd.NA, *LABELS[1:]], dtype="Int64"))
    assert "1 of 30 labels are missing" in refused(pd.Series([pd.NA, *NAMES[LABELS[1:]]], dtype="string").astype(str))
    holes = pd.DataFrame({"a": pd.Series([pd.NA, *LABELS[1:]], dtype="Int64")})
    assert "column 'a' of the features lacks 1 of 30" in refused(inputs=holes)
    twice = pd.DataFrame(FEATURES, columns=["a", "a", "b", "c"])
    np.testing.assert_array_equal(made(inputs=twice).train.inputs, FEATURES.astype(np.float32))
    dates = pd.DataFrame({"a": FEATURES[:, 0], "when": pd.date_range("2020-01-01", periods=30)})
    assert "column 'when' of the features holds" in refused(inputs=dates)


def test_npz_with_labels_of_text_is_taken(tmp_path, arrays):
    plain = read_npz(saved(tmp_path / "a.npz", arrays), None)
    text = {name: NAMES[value] if name.endswith("labels") else value for name, value in arrays.items()}
    data = read_npz(saved(tmp_path / "b.npz", text), None)
    assert data.class_names == ("cat", "cow", "dog") and data.fingerprint() == plain.fingerprint()


def saved(path, arrays):
    np.savez(path, **arrays)
    return path


def table(path, **columns):
    """A table of `FEATURES` and `columns`."""
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({f"x{i}": FEATURES[:, i] for i in range(4)} | columns)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=path.stem == "indexed")
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "indexed.csv"])
def test_table_is_the_data_set_of_its_arrays(tmp_path, capfd, name):
    data = read_file(table(tmp_path / name, species=NAMES[LABELS]), None, 0.2, 3)
    said = capfd.readouterr().err
    assert "labels are its column 'species', features its 4 others" in said and said.count("\n") == 1
    expected = cut_test(made(NAMES[LABELS]), 0.2, 3)
    assert data.fingerprint() == expected.fingerprint() and data.class_names == ("cat", "cow", "dog")
    assert len(data.test) == 6


def test_label_column_goes_by_name_before_the_last(tmp_path):
    path = table(tmp_path / "a.csv", Target=LABELS + 1, weight=FEATURES[:, 0])
    data = read_file(path, None)
    assert data.class_names == ("1", "2", "3") and data.example_shape == (5,)
    both = table(tmp_path / "b.csv", target=LABELS, label=NAMES[LABELS])
    with pytest.raises(DataError, match="has the columns target, label, expected one column of labels"):
        read_file(both, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a table"),
        (b"a,label\n", "is empty"),
        (b"1.5,2.5,0\n1,2,1\n", "begins with numbers"),
        (b"a;b;label\n1;2;0\n", "the one column 'a;b;label'"),
        (b"a,label\n1,x\n2,3,y\n", "cannot be read as a table"),
        (b"a,label\n1,caf\xe9\n", "cannot be read as a table"),
        (b"a,label\n1,x\n2,\n", "1 of 2 labels are missing"),
        (b"a,label\n,x\n2,y\n", "column 'a' of the features lacks 1 of 2"),
        (b"name,label\nbob,x\n2,y\n", "column 'name' of the features holds 'bob'"),
        (None, "No such file"),
    ],
)
def test_tables_that_cannot_be_read_are_one_line(tmp_path, content, message):
    pytest.importorskip("pandas")
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_file(path, None)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(path) in str(caught.value)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_file(tmp_path / "bad.parquet", None)


def test_table_without_pandas_says_what_to_install(tmp_path, monkeypatch):
    load = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError("No module named 'pandas'")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match="run: pip install pandas"):
        read_file(tmp_path / "a.csv", None)


def test_table_of_lone_examples_cannot_be_cut():
    with pytest.raises(UsageError, match=r"no class has enough examples to hold out 0\.2"):
        cut_test(made(NAMES, FEATURES[:3]), 0.2, 0)


def test_compare_takes_text_and_refuses_masks():
    small = {"heads": "dense", "floors": False, "trials": 1, "num_seeds": 1, "epochs": 1, "batch_size": 8}
    compared = pspinal_jax.compare(FEATURES, NAMES[LABELS], progress=False, **small)
    numbered = pspinal_jax.compare(FEATURES, LABELS, progress=False, **small)
    assert compared.result["methods"]["dense"]["test_accuracy"] == numbered.result["methods"]["dense"]["test_accuracy"]
    for splits in ({}, {"test_features": FEATURES, "test_labels": np.ma.masked_array(LABELS, LABELS == 0)}):
        with pytest.raises(DataError, match="masked"):
            inputs = FEATURES if splits else np.ma.masked_array(FEATURES, FEATURES > 2)
            pspinal_jax.compare(inputs, LABELS, progress=False, **small, **splits)


def test_rows_to_predict_from_are_as_wide_as_those_trained_on():
    np.testing.assert_array_equal(read_rows(FEATURES, (), 4), FEATURES.astype(np.float32))
    with pytest.raises(DataError, match=r"features has shape \[30, 4\], but the run was trained on 5 features"):
        read_rows(FEATURES, (), 5)
