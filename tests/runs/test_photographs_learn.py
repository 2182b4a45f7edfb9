"""From scratch, on a user's own pictures: the real network, the real recipe, minutes of work."""

import json

import drawn_pictures
import pytest

from pspinal_jax.__main__ import main

pytestmark = pytest.mark.slow


def test_drawn_shapes_are_learnt_from_scratch(tmp_path, capsys):
    folder = drawn_pictures.write_folder(tmp_path / "shapes", 150)
    new = drawn_pictures.write_folder(tmp_path / "new", 10, seed=1)
    flags = ["--model.backbone", "resnet18", "--model.weights", "None", "--data.image-size", "64", "--epochs", "20"]
    workdir = tmp_path / "run"
    assert main(["train", "folder", "--data.path", str(folder), *flags, "--workdir", str(workdir)]) == 0
    assert json.loads((workdir / "result.json").read_text())["test_accuracy"]["mean"] > 0.9
    capsys.readouterr()
    paths = sorted(map(str, new.glob("*/*.jpg")))
    assert main(["predict", str(workdir), *paths, "--json"]) == 0
    predictions = json.loads(capsys.readouterr().out)
    right = sum(
        prediction["classes"][0]["class"] == path.split("/")[-2]
        for path, prediction in zip(paths, predictions, strict=True)
    )
    assert len(predictions) == 40 and right >= 36
