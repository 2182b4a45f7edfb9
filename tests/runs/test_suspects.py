"""Labels that look wrong: found by a classifier that has not seen them."""

import csv
import dataclasses

import numpy as np
import pytest
from PIL import Image

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.runs import suspects
from pspinal_jax.runs.directory import load_recipe_of as recipe_of
from pspinal_jax.runs.suspects import _folds, find_suspects, out_of_fold


def clusters(count, classes=4, width=10):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    return (6 * np.eye(width)[labels] + rng.normal(size=(count, width))).astype(np.float32), labels


def planted(labels, number, classes=4):
    """Labels of which the first `number` are wrong."""
    wrong = labels.copy()
    wrong[:number] = (wrong[:number] + 1) % classes
    return wrong


@pytest.mark.parametrize("width", [10, 60])  # more examples than features, and fewer
def test_out_of_fold_probabilities_find_planted_labels(width):
    features, labels = clusters(count := 60, width=width)
    wrong = planted(labels, 3)
    rows = out_of_fold(features, wrong, np.arange(count))
    np.testing.assert_allclose(np.exp(rows).sum(1), 1, rtol=1e-6)
    order = np.argsort(rows[np.arange(count), wrong])
    assert {0, 1, 2} <= set(order[: count // 10].tolist())
    assert (rows.argmax(1) == labels).mean() > 0.9


def test_groups_lie_in_one_fold_and_classes_are_spread():
    labels = np.repeat([0, 1], 50)
    groups = np.arange(100) // 2
    folds = _folds(labels, groups)
    assert (folds[::2] == folds[1::2]).all() and np.bincount(folds[:50]).tolist() == [10] * 5


def test_a_copy_does_not_speak_for_its_own_label():
    features, labels = clusters(100)
    features, wrong = np.concatenate([features, features[:5]]), np.append(planted(labels, 5), planted(labels, 5)[:5])
    rows = out_of_fold(features, wrong, np.append(np.arange(100), np.arange(5)))
    assert (rows[np.arange(105), wrong][[0, 1, 2, 3, 4, 100]] < -1).all()


def test_class_in_one_fold_alone_is_not_accused():
    features, labels = clusters(60)
    labels[7] = 4
    rows = out_of_fold(features, labels, np.arange(60))
    assert rows[7, 4] == 0 and np.isfinite(rows).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("suspects")
    features, labels = clusters(120)
    wrong = planted(labels, 6)
    arrays = {"train_images": features[:100], "train_labels": wrong[:100]}
    np.savez(place / "data.npz", **arrays, test_images=features[100:], test_labels=wrong[100:])
    return pspinal_jax.train("linear", data__path=place / "data.npz", workdir=place / "run", epochs=1).path


def test_suspects_command_names_them(run, tmp_path, capsys):
    assert main(["suspects", str(run), "--top", "3", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == 5 and printed[0].split()[:3] == ["example", "split", "label"] and "120 examples" in printed[-1]
    )
    lines = list(csv.DictReader((tmp_path / "out" / "suspects.csv").read_text().splitlines()))
    assert {(line["split"], line["example"]) for line in lines[:6]} == {("train", f"row {index}") for index in range(6)}
    assert list(lines[0]) == ["example", "split", "label", "probability_of_label", "suggested", "probability"]
    assert all(line["label"] != line["suggested"] for line in lines[:6]) and len(lines) == 120
    likely = [float(line["probability_of_label"]) for line in lines]
    assert likely == sorted(likely)
    assert not (tmp_path / "out" / "suspects.png").exists()  # features are no pictures
    assert main(["suspects", str(run), "--top", "-1"]) == 2


def test_suspects_of_changed_data_are_refused(run, tmp_path):
    path = run.parent / "data.npz"
    held = path.read_bytes()
    try:
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {"test_labels": np.roll(arrays["test_labels"], 1)})
        with pytest.raises(DataError, match="is no longer what the run was trained on"):
            find_suspects(run)
    finally:
        path.write_bytes(held)


@pytest.mark.slow
def test_suspects_of_pictures(pictures, tiny_flags, tmp_path, monkeypatch):
    """Of cached features they are a sheet of pictures too; a backbone of random numbers has none to give."""
    command = ["train", "folder", "--data.path", str(pictures), *tiny_flags, "--epochs", "1", "--freeze", "backbone"]
    assert main([*command, "--cache-features", "--workdir", str(tmp_path / "cached")]) == 0
    assert main(["suspects", str(tmp_path / "cached")]) == 0
    lines = list(csv.DictReader((tmp_path / "cached" / "suspects.csv").read_text().splitlines()))
    assert len(lines) == 42 and {line["label"] for line in lines} == {"circle", "cross", "square"}
    assert (pictures / lines[0]["example"]).is_file()
    with Image.open(tmp_path / "cached" / "suspects.png") as sheet:
        assert min(sheet.size) > 200
    assert main(["report", str(tmp_path / "cached")]) == 0
    page = (tmp_path / "cached" / "report.html").read_text()
    assert "Labels that look wrong" in page and "looks like" in page
    monkeypatch.setattr(
        suspects, "load_recipe_of", lambda config: dataclasses.replace(recipe_of(config), cache_features=False)
    )
    with pytest.raises(UsageError, match="began with a backbone of random numbers"):  # as one that is fine-tuned
        find_suspects(tmp_path / "cached")
