"""What a run was trained on is known again: in its own test split, in what is evaluated, by runs that start from it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.data.dataset import ArraySplit, array_dataset, digest_rows
from pspinal_jax.recipes import DataConfig, load_recipe
from pspinal_jax.runs.build import split_examples
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.start import SEEN, read_seen

SMALL = {"model__layer_width": 4, "model__num_layers": 1, "batch_size": 8, "eval_batch_size": 8, "epochs": 1}
NO_BACKBONE = {"model__backbone": "none", "model__weights": None, "data__image_size": 8, "data__augment": "none"}
FOLDER = SMALL | NO_BACKBONE | {"data__validation_fraction": 0.2}


def features(seed, count=40):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 6)).astype(np.float32), np.arange(count) % 2


def save(path, train, test):
    arrays = {"train_images": train[0], "train_labels": train[1], "test_images": test[0], "test_labels": test[1]}
    np.savez(path, **arrays)
    return path


def pictures(folder, seed, names):
    rng = np.random.default_rng(seed)
    for label in "ab":
        (folder / label).mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / label / name)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run on rows of which 3 test rows are training rows, and one on a folder of 20 pictures, each there twice."""
    place = tmp_path_factory.mktemp("seen")
    train, test = features(0), features(1, 20)
    test[0][[2, 5, 6]] = train[0][[0, 1, 4]]
    path = save(place / "rows.npz", train, test)
    pspinal_jax.train("features", data__path=path, data__num_validation=10, workdir=place / "rows", **SMALL)
    pictures(place / "pictures", 2, [f"{index}.png" for index in range(10)])
    for file in list((place / "pictures").rglob("*.png")):
        shutil.copy(file, file.with_name(f"{file.stem} (copy).png"))
    pspinal_jax.train("folder", data__path=place / "pictures", workdir=place / "folder", **FOLDER)
    return place


def evaluated(capsys, run, *args):
    """(evaluation.json or such, what was said) of `evaluate`."""
    capsys.readouterr()
    output = run.parent / "evaluated"
    shutil.rmtree(output, ignore_errors=True)
    assert main(["evaluate", str(run), "--output", str(output), *map(str, args)]) == 0
    (written,) = output.glob("evaluation*.json")
    return json.loads(written.read_text()), capsys.readouterr()


def test_train_counts_test_rows_that_are_training_rows(place):
    counts = json.loads((place / "rows" / "result.json").read_text())["copies"]
    assert counts == {"test_in_train": 3, "validation_in_train": 0, "in_several_classes": 0}


def test_a_run_keeps_digests_of_its_parts(place):
    seen = read_seen(RunDirectory(place / "rows"))
    assert {kind: len(each) for kind, each in seen.items()} == {"train": 30, "validation": 10, "before": 0}
    expected = np.sort(digest_rows(features(0)[0]))
    np.testing.assert_array_equal(np.sort(np.concatenate([seen["train"], seen["validation"]])), expected)


def test_train_cuts_validation_with_copies_on_one_side():
    (inputs, labels), test = features(3, 20), ArraySplit(*features(4))
    doubled = ArraySplit(np.tile(inputs, (2, 1)), np.tile(labels, 2))
    data = array_dataset({"train": doubled, "test": test}, ("a", "b"), "rows")
    for together in (True, False):
        config = DataConfig("rows", num_validation=8, keep_copies_together=together)
        train, validation = split_examples(
            dataclasses.replace(load_recipe("features"), data=config, batch_size=8), data
        )
        assert len(validation) == 8
        assert bool(np.isin(doubled.digests[validation], doubled.digests[train]).any()) is not together


def test_evaluate_counts_rows_that_the_run_was_trained_on(place, tmp_path, capsys):
    seen, new = read_seen(RunDirectory(place / "rows")), features(5, 12)
    inputs, _ = features(0)
    validated = np.flatnonzero(np.isin(digest_rows(inputs), seen["validation"]))[0]
    trained = np.flatnonzero(np.isin(digest_rows(inputs), seen["train"]))[:2]
    new[0][[0, 1, 2]] = inputs[[validated, *trained]]
    path = save(tmp_path / "new.npz", features(6), new)
    report, said = evaluated(capsys, place / "rows", "--data.path", path, "--predictions", tmp_path / "p.csv")
    found = report["seen_in_training"]
    assert (found["examples"], found["trained_on"], found["validated_on"]) == (3, 2, 1) and report["part"] == "test"
    right = [line.split(",")[3] == "1" for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    assert found["accuracy_of_others"] == np.mean(right[3:])
    (warning,) = [line for line in said.err.splitlines() if line.startswith("warning")]
    assert "3 of the 12 examples scored were trained or validated on: row 0, row 1, row 2; accuracy on the 9" in warning
    report, said = evaluated(capsys, place / "rows")
    assert report["seen_in_training"]["examples"] == 3 and "3 of the 20" in said.err


def test_evaluate_scores_all_pictures_of_a_folder_without_splits(place, tmp_path, capsys):
    new = pictures(tmp_path / "new", 7, ["0.png", "1.png"])
    report, said = evaluated(capsys, place / "folder", "--data.path", new)
    assert (report["part"], report["examples"], report["seen_in_training"]["examples"]) == ("all", 4, 0)
    assert f"{new}, all 4 examples: it holds no split" in said.out and "warning" not in said.err
    one = pictures(tmp_path / "one", 8, ["0.png"])  # of too few pictures to cut any
    assert evaluated(capsys, place / "folder", "--data.path", one)[0]["examples"] == 2
    split = tmp_path / "split"
    for name, seed in (("train", 9), ("test", 10)):
        pictures(split / name, seed, ["0.png", "1.png", "2.png"])
    report, said = evaluated(capsys, place / "folder", "--data.path", split)
    assert (report["part"], report["examples"]) == ("test", 6) and "its test split" in said.out


def test_evaluate_scores_all_rows_of_a_table(place, tmp_path, capsys):
    pytest.importorskip("pandas")
    inputs, labels = features(0)
    lines = [
        ",".join([*map(repr, row.tolist()), str(label)]) for row, label in zip(inputs[:2], labels[:2], strict=True)
    ]
    (tmp_path / "new.csv").write_text("\n".join(["a,b,c,d,e,f,label", *lines]) + "\n")
    report, said = evaluated(capsys, place / "rows", "--data.path", tmp_path / "new.csv")
    assert (report["part"], report["examples"], report["seen_in_training"]["examples"]) == ("all", 2, 2)
    assert "new.csv, all 2 examples: it holds no split" in said.out and "2 of the 2 examples scored" in said.err


def test_evaluate_of_the_own_folder_scores_the_test_split_and_of_a_grown_one_names_what_was_seen(
    place, tmp_path, capsys
):
    report, said = evaluated(capsys, place / "folder", "--data.path", place / "pictures")
    assert (report["part"], report["trained_on_it"], report["examples"]) == ("test", True, 8)
    assert report["seen_in_training"]["examples"] == 0 and "warning" not in said.err
    grown = shutil.copytree(place / "pictures", tmp_path / "grown")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(grown / "a" / "0b.png")
    report, said = evaluated(capsys, place / "folder", "--data.path", grown)
    assert (report["part"], report["examples"], report["seen_in_training"]["examples"]) == ("all", 41, 32)
    assert report["seen_in_training"]["validated_on"] == 4  # a pair of each class
    assert "warning: 32 of the 41 examples scored were trained or validated on: a/" in said.err


def test_evaluate_of_an_export_says_what_it_cannot_know(place, tmp_path, capsys):
    assert main(["export", str(place / "rows"), "--output", str(tmp_path / "export")]) == 0
    report, said = evaluated(
        capsys, tmp_path / "export", "--data.path", save(tmp_path / "n.npz", features(6), features(7))
    )
    assert report["seen_in_training"] is None and "export is an export without checksums" in said.err
    report, said = evaluated(capsys, tmp_path / "export", "--data.path", place / "rows.npz")
    assert report["seen_in_training"]["examples"] == 3 and "3 of the 20 examples scored" in said.err


def test_init_from_names_test_examples_that_the_earlier_run_was_trained_on(place, tmp_path, capsys):
    inputs, labels = features(0)
    train = features(8)
    tested = np.concatenate([inputs[:10], train[0][:2]]), np.append(labels[:10], [1, 1])
    path = save(tmp_path / "other.npz", train, tested)
    first = pspinal_jax.train("features", data__path=path, workdir=tmp_path / "1", init_from=place / "rows", **SMALL)
    assert first.result["copies"] == {
        "test_in_train": 2,
        "validation_in_train": 0,
        "in_several_classes": 2,
        "test_in_init_from": 10,
    }
    said = capsys.readouterr().err
    assert f"10 of 12 test examples are ones that {place / 'rows'} was trained on: test row 0" in said
    assert f"warning: {path}: 2 of 12 test examples are also in train, identical: test row 10, test row 11; " in said
    assert "2 examples have identical copies in another class: train row 0, test row 10" in said
    again = pspinal_jax.train("features", data__path=path, workdir=tmp_path / "2", init_from=tmp_path / "1", **SMALL)
    assert again.result["copies"]["test_in_init_from"] == 12
    assert len(read_seen(RunDirectory(again.path))["before"]) == 80


@pytest.mark.slow
def test_a_damaged_file_of_digests_is_warned_of_and_the_scores_stand(place, tmp_path, capsys):
    run = shutil.copytree(place / "rows", tmp_path / "run")
    (run / SEEN).write_bytes(b"damaged")
    path = save(tmp_path / "new.npz", features(6), features(5))
    report, said = evaluated(capsys, run, "--data.path", path)
    assert report["seen_in_training"] is None and f"{run / SEEN} is damaged" in said.err


@pytest.mark.slow
def test_a_run_of_before_there_were_digests_goes_on_with_its_own_cut(place, tmp_path, capsys):
    run = tmp_path / "old"
    words = FOLDER | {"data__path": place / "pictures", "workdir": run}
    before = pspinal_jax.train("folder", data__keep_copies_together=False, **words).result
    config = json.loads((run / "config.json").read_text())
    del config["checksum"], config["identity"]["data"]["keep_copies_together"]
    (run / "config.json").write_text(json.dumps(config | {"checksum": json_checksum(config)}))
    (run / SEEN).unlink()
    (run / "manifest.json").unlink()
    (run / "result.json").unlink()
    assert pspinal_jax.train("folder", **words).result["test_accuracy"] == before["test_accuracy"]
    (run / SEEN).unlink()
    (run / "manifest.json").unlink()
    report, _ = evaluated(capsys, run)
    assert report["trained_on_it"] and report["seen_in_training"]["examples"] == before["copies"]["test_in_train"] > 0
    other = pictures(tmp_path / "other", 11, ["0.png"])
    assert "a run without checksums" in evaluated(capsys, run, "--data.path", other)[1].err


def test_copies_are_kept_together_unless_a_run_recorded_otherwise():
    assert DataConfig("x").keep_copies_together and load_recipe("folder").data.keep_copies_together
    assert "keep_copies_together" in dataclasses.asdict(DataConfig("x"))
