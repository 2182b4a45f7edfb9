"""`pspinal-jax compare`: from files to a table, one line for what is wrong, kills, four devices."""

import json

import numpy as np
import pytest
from comparison_support import make_features
from kill_comparison import finish, kill_again_and_again, result_of, start, write_data
from PIL import Image

from pspinal_jax import load_run
from pspinal_jax.__main__ import main
from pspinal_jax.comparison.answers import read_records
from pspinal_jax.runs.predict import load_predictor

SMALL = [
    *("--trials", "2", "--num-seeds", "2", "--epochs", "1", "--batch-size", "16"),
    *("--layer-width", "4", "--num-layers", "2", "--heads", "mlp", "dense"),
]
ALONE = ["--no-floors", "--no-refit"]


@pytest.fixture
def features_path(tmp_path):
    path, arrays = tmp_path / "features.npz", {}
    for name, (inputs, labels) in make_features().items():
        arrays |= {f"{name}_images": inputs, f"{name}_labels": labels}
    np.savez(path, **arrays)
    return path


def test_compare_writes_a_table_and_files(features_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(features_path), *SMALL, "--no-floors"]) == 0
    said = capsys.readouterr().out
    assert "programs compiled: mlp 2, dense 2" in said and "Best on validation is" in said
    folder = tmp_path / "runs" / "compare-features"
    files = {"config.json", "trials.jsonl", "compare.json", "compare.md", "compare.png"}
    assert {path.name for path in folder.iterdir()} == files | {".lock", "probabilities", "best"}
    result = json.loads((folder / "compare.json").read_text())
    assert result["command"] == f"pspinal-jax compare {features_path} {' '.join(SMALL)} --no-floors"
    assert {row["train_examples"] for row in result["methods"].values()} == {120}
    assert f"{result['saved']} as a run: pspinal-jax predict runs/compare-features/best .." in said
    check_best(folder, result, features_path)
    assert result["data"] | {"fingerprint": "", "source": ""} == {
        "source": "", "fingerprint": "", "features": 6, "classes": 3, "train": 96, "validation": 24, "test": 60
    }  # fmt: skip


def check_best(folder, result, features_path):
    """The run is the row: the same answers, also by `evaluate`, and of its export."""
    run, name = load_run(folder / "best"), result["saved"]
    with np.load(features_path) as arrays:
        inputs, labels = arrays["test_images"], arrays["test_labels"]
    (record,) = [
        line
        for line in map(json.loads, (folder / "trials.jsonl").read_text().splitlines())
        if (line["kind"], line["method"], line["number"]) == ("refit", name, 0)
    ]
    answers = read_records([[record]], labels[None])
    probabilities = run.predict_proba(inputs)
    np.testing.assert_array_equal(probabilities.argmax(1), answers.predicted[0, 0])
    np.testing.assert_allclose(probabilities.max(1), answers.confidence[0, 0], rtol=2e-3)
    report = run.evaluate()
    assert report["accuracy"] == record["test_accuracy"] and report["trained_on_it"]
    assert report["loss"] == pytest.approx(-answers.log_likelihood.mean(), rel=2e-3)
    assert report["seen_in_training"]["examples"] == 0
    assert load_predictor(run.export()).class_names == run.class_names
    assert run.result["train_examples"] == 120


@pytest.mark.slow
def test_compare_flattens_pixels(npz_path, tmp_path):
    assert main(["compare", str(npz_path), *SMALL, *ALONE, "--workdir", str(tmp_path / "pixels")]) == 0
    result = json.loads((tmp_path / "pixels" / "compare.json").read_text())
    assert result["data"]["features"] == 16
    assert {row["chosen"][0]["setting"]["standardize"] for row in result["methods"].values()} == {"all"}
    best = load_run(tmp_path / "pixels" / "best")
    assert best.config["input_shape"] == [4, 4, 1]
    assert best.evaluate()["accuracy"] == best.result["test_accuracy"]["mean"]


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ([], 2, "error: compare takes data: an .npz file"),
        (["nothing"], 1, "error: nothing does not exist; compare takes an .npz file, a table, a folder"),
        (["nothing.npz"], 1, "error: nothing.npz cannot be read as an .npz file"),
        (["DATA", "--heads", "deep"], 2, "invalid choice"),
        (["DATA", "--heads", "mlp", "mlp"], 2, "error: heads are mlp mlp, expected some of"),
        (["DATA", "--batch-size", "1000"], 2, "error: --batch-size is 1000, but only 96 examples"),
        (["DATA", "--learning-rate", "0", "1"], 2, "error: --learning-rate is 0 .. 1, expected 0 < LOW"),
        (["DATA", "--trails", "3"], 2, "--trials"),
        (["DATA", "--backbone", "resnet18"], 2, "error: --backbone and --weights are for folders of images"),
        (["FOLDER", "--backbone", "resnet18"], 2, "error: --backbone is resnet18, expected one of efficientnet_lite0"),
        (["FOLDER"], 1, "error: "),
    ],
)
def test_compare_refuses_in_one_line(words, status, line, features_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"DATA": str(features_path), "FOLDER": str(tmp_path / "empty")}
    assert main(["compare", *(places.get(word, word) for word in words)]) == status
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1, said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_compare_killed_at_random_moments_ends_the_same(tmp_path):
    write_data(tmp_path)
    finish(start(tmp_path, "alone"))
    records = kill_again_and_again(tmp_path, 4, seed=1)
    assert result_of(tmp_path, "killed") == result_of(tmp_path, "alone")
    assert records[-1]["lines"] > 0


@pytest.mark.slow
def test_compare_on_four_devices_chooses_as_on_one(tmp_path):
    write_data(tmp_path)
    finish(start(tmp_path, "one"))
    finish(start(tmp_path, "four", devices=4))
    execution = json.loads((tmp_path / "four" / "compare.json").read_text())["execution"]
    assert execution["mode"] == "vmap" and execution["device"]["count"] == 4
    assert set(execution["compilations"].values()) == {2}
    one, four = (result_of(tmp_path, name)["methods"] for name in ("one", "four"))
    assert one.keys() == four.keys()
    for name in one:
        for theirs, ours in zip(one[name]["chosen"], four[name]["chosen"], strict=True):
            assert theirs["setting"] == ours["setting"]
        # An example or two may lie so near a border that rounding decides.
        np.testing.assert_allclose(
            one[name]["test_accuracy"]["each"], four[name]["test_accuracy"]["each"], atol=2 / 300
        )


@pytest.mark.slow
def test_compare_keeps_the_features_of_a_folder(tmp_path, capsys):
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    for index, name in enumerate(("dark", "light", "mixed")):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(80 * index, 80 * index + 80, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    words = ["compare", str(folder), *SMALL, "--workdir", str(tmp_path / "work"), "--backbone", "efficientnet_lite0"]
    assert main([*words, "--weights", "random"]) == 0
    run = load_run(tmp_path / "work" / "best")
    assert run.evaluate()["accuracy"] == run.result["test_accuracy"]["mean"]
    assert run.predict([folder / "dark" / "0.png"])[0].classes[0][0] in run.class_names
    features = tmp_path / "work" / "features.npz"
    first = features.stat().st_mtime_ns
    assert json.loads((tmp_path / "work" / "compare.json").read_text())["data"]["features"] == 1280
    assert main([*words, "--weights", "random", "--trials", "3"]) == 0
    assert features.stat().st_mtime_ns == first
    (folder / "dark" / "0.png").unlink()
    capsys.readouterr()
    assert main([*words, "--weights", "random"]) == 2
    assert "holds features of other images or another backbone" in capsys.readouterr().err
