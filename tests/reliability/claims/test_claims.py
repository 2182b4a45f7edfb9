"""What a run claims is what it holds: its data, its result and its parameters belong together, or a command fails."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.errors import DataError, RunError
from pspinal_jax.runs import evaluate as evaluate_module
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.result import load_variables

SMALL = {"epochs": 3, "batch_size": 16, "eval_batch_size": 16, "data__num_validation": 20, "data__num_classes": 3}
SMALL |= {"model__layer_width": 8}


@pytest.fixture(scope="module")
def whole(arrays, tmp_path_factory):
    """A folder with a run, and the data it was trained on by a relative path."""
    folder = tmp_path_factory.mktemp("claims")
    np.savez(folder / "d.npz", **arrays)
    before = os.getcwd()
    os.chdir(folder)
    try:
        pspinal_jax.train("digits", data__path="d.npz", workdir="run", checkpoint_seconds=0, **SMALL)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def place(whole, tmp_path):
    """A copy of it: the run still looks for its data where it was trained."""
    return shutil.copytree(whole, tmp_path / "copy")


def test_a_relative_data_path_is_found_from_anywhere(whole, arrays, tmp_path, monkeypatch):
    np.savez(tmp_path / "d.npz", **{**arrays, "test_labels": (arrays["test_labels"] + 1) % 3})
    monkeypatch.chdir(tmp_path)
    run = pspinal_jax.load_run(whole / "run")
    assert run.evaluate()["accuracy"] == pytest.approx(run.result["test_accuracy"]["mean"])
    assert run.recipe.data.path == whole / "d.npz"


@pytest.mark.parametrize("name", ["test_labels", "test_images", "train_images", "train_labels"])
def test_changed_data_is_refused(whole, arrays, name, capsys):
    """Also where the training split alone has changed: what was trained on may be in the test split now."""
    changed = arrays[name].copy()
    changed[0] = (changed[0] + 1) % 3
    np.savez(whole / "d.npz", **{**arrays, name: changed})
    try:
        assert main(["evaluate", str(whole / "run")]) == 1
    finally:
        np.savez(whole / "d.npz", **arrays)
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no longer what the run was trained on" in line and "--data.path" in line


def test_added_images_are_seen(tmp_path):
    """They change the split into training and test examples."""
    rng = np.random.default_rng(0)

    def add(first, count):
        for name in ("dark", "light"):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            for index in range(first, first + count):
                pixels = rng.integers(0, 100, (16, 16, 3), np.uint8) + 100 * (name == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / f"{index:03}.png")

    add(0, 12)
    small = {"model__backbone": "none", "model__weights": None, "data__image_size": 8, "data__augment": "none"}
    small |= {"model__layer_width": 4, "batch_size": 4, "eval_batch_size": 4, "epochs": 1, "model__head": "dense"}
    run = pspinal_jax.train("folder", data__path=tmp_path / "data", workdir=tmp_path / "run", **small)
    assert run.evaluate()["accuracy"] == pytest.approx(run.result["test_accuracy"]["mean"])
    add(12, 4)
    with pytest.raises(DataError, match="no longer what the run was trained on"):
        run.evaluate()


def test_other_data_is_named_and_replaces_nothing(place, arrays, tmp_path, capsys):
    run = place / "run"
    assert main(["evaluate", str(run)]) == 0
    own, plot = json.loads((run / "evaluation.json").read_text()), (run / "confusion.png").read_bytes()
    assert "other data" not in capsys.readouterr().out
    np.savez(tmp_path / "other.npz", **{**arrays, "test_labels": (arrays["test_labels"] + 1) % 3})
    assert main(["evaluate", str(run), "--data.path", str(tmp_path / "other.npz")]) == 0
    assert f"on other data than the run was trained on: {tmp_path / 'other.npz'}" in capsys.readouterr().out
    (path,) = run.glob("evaluation-*.json")
    listed = {"other_data": {path.name: str(tmp_path / "other.npz")}}
    assert json.loads((run / "evaluation.json").read_text()) == own | listed
    assert (run / "confusion.png").read_bytes() == plot
    report = json.loads(path.read_text())
    assert report["data"] == str(tmp_path / "other.npz") and path.stem.endswith(report["data_fingerprint"])


def test_a_run_that_cannot_be_written_is_evaluated(place, capsys, monkeypatch):
    def refuse(path, value):
        raise RunError(f"{path} cannot be written: Read-only file system")

    monkeypatch.setattr(evaluate_module, "write_json", refuse)
    assert main(["evaluate", str(place / "run")]) == 0
    printed = capsys.readouterr()
    assert "test accuracy" in printed.out and "evaluation.json" not in printed.out
    assert "warning: " in printed.err and "evaluation.json cannot be written" in printed.err


def newest(run):
    return max((run / "checkpoints").iterdir(), key=lambda step: int(step.name))


def drop_newest(run):
    shutil.rmtree(newest(run))


def drop_best(run):
    shutil.rmtree(newest(run) / "best")


def drop_all(run):
    shutil.rmtree(run / "checkpoints")


def damage(run):
    for file in (newest(run) / "best").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 255
            file.write_bytes(content)


def swap_result(run):
    """The result of another run, well-formed and with its checksum."""
    result = json.loads((run / "result.json").read_text())
    del result["checksum"]
    result |= {"selected_checksum": "00000000"}
    (run / "result.json").write_text(json.dumps({**result, "checksum": json_checksum(result)}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_newest, "does not hold the parameters of result.json"),
        (swap_result, "does not hold the parameters of result.json"),
        (drop_best, "is damaged"),
        (damage, "is damaged"),
        (drop_all, "checkpoints holds no checkpoint"),
    ],
)
def test_no_other_parameters_stand_in_for_the_selected_ones(place, spoil, message, capfd):
    spoil(place / "run")
    with pytest.raises(RunError, match=message):
        load_variables(place / "run")
    assert "using checkpoint" not in capfd.readouterr().err


def without_checksums(result):
    """As result.json was before it held any."""
    return {name: value for name, value in result.items() if name not in ("checksum", "selected_checksum")}


def test_a_run_of_before_checksums_opens_unless_its_newest_checkpoint_is_another(place):
    run = place / "run"
    result = without_checksums(json.loads((run / "result.json").read_text()))
    (run / "result.json").write_text(json.dumps(result))
    load_variables(run)
    (run / "result.json").write_text(json.dumps({**result, "selected_epoch": [99]}))
    with pytest.raises(RunError, match="does not hold the parameters of result"):
        load_variables(run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[1]", "is damaged: it is"),
        ('{"test_accuracy": {"mean": 1.0}, "checksum": "0"}', "is damaged: it lacks"),
        (b"\xff\xfe{}", "is damaged"),
    ],
)
@pytest.mark.parametrize("name", ["result.json", "config.json"])
def test_malformed_json_is_one_line(place, name, content, message):
    (place / "run" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=f"{name} .*{message}") as caught:
        _ = pspinal_jax.load_run(place / "run").result
    assert "\n" not in str(caught.value)


def test_the_manifest_knows_its_files(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    run = RunDirectory(tmp_path)
    run.verify("a")  # a run of before there were manifests
    run.record("a")
    run.record("b")
    run.verify("a", "b", "c")
    (tmp_path / "a").write_text("3")
    with pytest.raises(RunError, match="a is damaged: it does not match its checksum"):
        run.verify("a")
    run.verify("b")
    (tmp_path / "a").unlink()
    with pytest.raises(RunError, match="a cannot be read"):
        run.verify("a")
    path = run.manifest_path
    path.write_text(path.read_text().replace('"a"', '"c"'))
    with pytest.raises(RunError, match="does not match its checksum"):
        run.verify("b")
