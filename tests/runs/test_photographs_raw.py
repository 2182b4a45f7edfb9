"""Each photograph set, from files as published to an evaluated run, by the commands that a user types."""

import json
import sys
from pathlib import Path

import pytest
from drawn_pictures import TINY

from pspinal_jax.__main__ import main

sys.path.append(str(Path(__file__).parents[1] / "data"))
import raw_images

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHORT = [*TINY, "--model.layer-width", "8", "--epochs", "1", "--eval-batch-size", "8", "--dtype", "float32"]


def picture(label, number):
    """A tiny JPEG whose colour is its class's."""
    return raw_images.jpeg((label * 37 + number) % 256, (10, 12), mode="L" if number % 5 == 4 else "RGB")


def write_raw(name, folder):
    """The set `name` with all its classes, as few pictures of each as there can be."""
    if name == "stl10":
        files = raw_images.stl10_files(raw_images.stl10_arrays(30, 12))
        return raw_images.write_files(folder, {f"stl10_binary/{file}": content for file, content in files.items()})
    if name == "caltech101":
        members = {"101_ObjectCategories": None, "101_ObjectCategories/BACKGROUND_Google/tmp": b"stray"}
        for label in range(101):
            for number in range(1, 32):
                members[f"101_ObjectCategories/class {label:03}/image_{number:04}.jpg"] = picture(label, number)
        return raw_images.write_zip(folder / "caltech-101.zip", raw_images.caltech_zip(members)).parent
    parts = {
        "fruits360": (131, {"fruits-360/Training": 2, "fruits-360/Test": 1}),
        "birds225": (225, {"train": 2, "valid": 1, "test": 1}),
    }
    classes, splits = parts[name]
    members = {
        f"{split}/CLASS {label:03}/{number}.jpg": picture(label, number)
        for split, count in splits.items()
        for label in range(classes)
        for number in range(count)
    }
    return raw_images.write_files(folder, members)


@pytest.mark.parametrize(
    ("name", "train", "validation", "test", "classes"),
    [
        pytest.param("stl10", 20, 10, 12, 10, marks=pytest.mark.slow),
        pytest.param("caltech101", 101 * 18, 101 * 12, 101, 101, marks=pytest.mark.slow),
        pytest.param("fruits360", 131, 131, 131, 131, marks=pytest.mark.slow),
        pytest.param("birds225", 450, 225, 225, 225, marks=pytest.mark.slow),
    ],
)
def test_raw_files_become_an_evaluated_run(name, train, validation, test, classes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw = write_raw(name, tmp_path / "raw")
    assert main(["prepare", name, "--raw", str(raw), "--data-dir", "data"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    start = words.index("pspinal-jax") + 1
    assert words[start : start + 2] == ["train", name]
    # The command that prepare suggests, on as few examples as there are.
    held = "0.5" if name == "fruits360" else "0.4"
    flags = [*SHORT, "--batch-size", "8" if name == "stl10" else "64", "--eval-batch-size", "64"]
    assert main([*words[start:], "--data.validation-fraction", held, *flags]) == 0
    run = Path("runs") / name
    result = json.loads((run / "result.json").read_text())
    assert result["protocol"] == "validation" and result["train_examples"] == train
    assert f"{validation} held-out training examples" in result["selection"]
    assert main(["evaluate", str(run)]) == 0
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["examples"] == test and len(evaluation["confusion"]) == classes
    assert evaluation["accuracy"] == pytest.approx(result["test_accuracy"]["mean"], abs=1e-6)


@pytest.mark.slow
def test_a_paper_twin_trains_on_all_and_reports_last_and_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = write_raw("stl10", tmp_path / "raw")
    assert main(["prepare", "stl10", "--raw", str(raw), "--data-dir", "data"]) == 0
    assert main(["train", "stl10-paper", "--data.data-dir", "data", *SHORT]) == 0
    result = json.loads(Path("runs/stl10-paper/result.json").read_text())
    assert result["protocol"] == "paper" and result["train_examples"] == 30 and "best_on_test_accuracy" in result
    line = json.loads(Path("runs/stl10-paper/metrics.jsonl").read_text().splitlines()[0])
    assert line["step"] == 4, "the last, smaller batch counts"
