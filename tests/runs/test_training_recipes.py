"""Whole runs with every option of training switched on: killed and resumed, several seeds, other devices, patience."""

import dataclasses
import json

import chex
import numpy as np
import pytest
from small_runs import Killed, metrics, options, small_recipe

from pspinal_jax.__main__ import main
from pspinal_jax.checkpoints import CheckpointStore, json_checksum
from pspinal_jax.errors import UsageError
from pspinal_jax.recipes import AugmentConfig, ModelConfig, OptimizerConfig, load_recipe
from pspinal_jax.runs.directory import load_recipe_of
from pspinal_jax.runs.evaluate import evaluate
from pspinal_jax.runs.result import load_variables
from pspinal_jax.runs.train import train
from pspinal_jax.training import loop as trainer_module
from pspinal_jax.training.examples import InMemoryExamples
from pspinal_jax.training.programs import SeedStates
from pspinal_jax.training.stages import balanced_accuracy


@pytest.fixture(scope="module")
def recipe(npz_path):
    """Every option that goes with images in memory, of two seeds; `class_weights` excludes the sampler."""
    return small_recipe(
        npz_path,
        model=ModelConfig(layer_width=6, num_layers=2, norm="batch", dropout_rate=0.1),
        optimizer=OptimizerConfig("sgd", learning_rate=0.05, schedule="cosine", warmup_epochs=0.75),
        augment=AugmentConfig(mixup=0.2, cutmix=1.0, color_jitter=0.3),
        micro_batches=2,
        num_seeds=2,
        sampler="balanced",
        gradient_clip=0.5,
        ema_decay=0.9,
        patience=3,
        seed_mode="vmap",
    )


WEIGHTED = {"sampler": "none", "class_weights": "balanced", "seed_mode": "loop"}


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """Of each mode a run that was never interrupted; treat as read-only."""
    place = tmp_path_factory.mktemp("finished")
    recipes = {"vmap": recipe, "loop": dataclasses.replace(recipe, **WEIGHTED)}
    return {name: (each, place / name, train(each, options(place / name))) for name, each in recipes.items()}


def kill_after(monkeypatch, chunks):
    """Dies after so many chunks of two steps, each of them saved."""
    monkeypatch.setattr(CheckpointStore, "due", lambda self, seconds: True)
    monkeypatch.setattr(trainer_module, "CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(InMemoryExamples, "first_chunk", 2)
    whole, calls = trainer_module.Trainer._chunk_steps, [0]

    def counted(self, remaining):
        calls[0] += 1
        if calls[0] > chunks:
            raise Killed
        return min(2, whole(self, remaining) + 1)

    monkeypatch.setattr(trainer_module.Trainer, "_chunk_steps", counted)


def outcome(workdir):
    result = json.loads((workdir / "result.json").read_text())
    return metrics(workdir), {
        key: result[key] for key in result if "seconds" not in key and key not in ("checksum", "costs")
    }


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "chunks"), [("vmap", 3), ("loop", 4)])
def test_a_resumed_run_equals_one_that_never_stopped(finished, tmp_path, monkeypatch, mode, chunks):
    recipe, workdir, _ = finished[mode]
    kill_after(monkeypatch, chunks)
    with pytest.raises(Killed):
        train(recipe, options(tmp_path / "run"))
    monkeypatch.undo()
    train(recipe, options(tmp_path / "run"))
    assert outcome(tmp_path / "run") == outcome(workdir)
    for index in range(2):
        chex.assert_trees_all_equal(load_variables(tmp_path / "run", index)[0], load_variables(workdir, index)[0])


@pytest.mark.slow
def test_what_is_reported_is_what_is_kept_and_the_settings_come_back(finished):
    """The averages: evaluating the checkpoint's selected parameters gives the result's accuracy."""
    recipe, workdir, result = finished["vmap"]
    for index in range(2):
        assert evaluate(workdir, index)["accuracy"] == result["test_accuracy"]["each"][index]
    config = json.loads((workdir / "config.json").read_text())
    assert dataclasses.replace(load_recipe_of(config), card=recipe.card, mesh=recipe.mesh) == recipe


@pytest.mark.slow
def test_balanced_training_is_selected_by_balanced_accuracy(finished):
    predictions, labels = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 1, 2]]), np.array([0, 0, 0, 1, 2])
    np.testing.assert_allclose(balanced_accuracy(predictions, labels), [1 / 3, (1 / 3 + 1 + 1) / 3])
    for _, workdir, result in finished.values():
        lines = metrics(workdir)
        scores = np.array([line["validation_balanced_accuracy"] for line in lines])
        losses = np.array([line["validation_loss"] for line in lines])
        selected = [int(np.lexsort([-loss, score])[-1]) + 1 for loss, score in zip(losses.T, scores.T, strict=True)]
        assert result["selected_epoch"] == selected
        assert result["validation_balanced_accuracy"]["each"] == scores.max(0).tolist()
        assert "validation_accuracy" not in result and "balanced accuracy" in result["selection"]
        assert (scores != np.array([line["validation_accuracy"] for line in lines])).any()
        kept = losses[np.array(selected) - 1, range(len(selected))]
        best = load_variables(workdir, int(np.lexsort([-kept, scores.max(0)])[-1]))[0]
        chex.assert_trees_all_equal(load_variables(workdir)[0], best)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["seed", "loop"])
def test_seeds_together_are_the_single_runs(finished, tmp_path, other):
    recipe, workdir, result = finished["vmap"]
    changes = {"seed": 1, "num_seeds": 1} if other == "seed" else {"seed_mode": "loop"}
    alone = train(dataclasses.replace(recipe, **changes), options(tmp_path / "run"))
    for index in range(len(alone["seeds"])):
        here = 1 if other == "seed" else index
        ours, theirs = load_variables(tmp_path / "run", index)[0], load_variables(workdir, here)[0]
        chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert alone["selected_epoch"][index] == result["selected_epoch"][here]


@pytest.mark.slow
def test_a_run_of_before_there_were_these_settings_goes_on(finished, npz_path, tmp_path, monkeypatch):
    recipe = dataclasses.replace(load_recipe("digits"), data=finished["vmap"][0].data, epochs=2, batch_size=16)
    kill_after(monkeypatch, 3)
    with pytest.raises(Killed):
        train(recipe, options(tmp_path / "run"))
    monkeypatch.undo()
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    identity = config["identity"]
    for name in ("augment", "patience", "class_weights", "sampler", "gradient_clip", "ema_decay"):
        identity.pop(name)
    identity["data"].pop("fit")
    for name in ("warmup_epochs", "backbone_rate"):
        identity["optimizer"].pop(name)
    config.pop("checksum")
    path.write_text(json.dumps(config | {"checksum": json_checksum(config)}))
    with pytest.raises(UsageError, match=r"ema_decay was 0.0 and is now 0.9"):
        train(dataclasses.replace(recipe, ema_decay=0.9), options(tmp_path / "run"))
    assert train(recipe, options(tmp_path / "run"))["epochs"] == 2


EVALUATE = SeedStates.evaluate


def scripted(monkeypatch, accuracies):
    """Every evaluation of the validation split finds the next of `accuracies` [epochs, K], of 24 examples."""
    monkeypatch.setattr("pspinal_jax.runs.build.selected_by", lambda recipe: "accuracy")
    monkeypatch.setattr("pspinal_jax.runs.result.selected_by", lambda recipe: "accuracy")
    calls = []

    def evaluated(self, data, count, *, best=False):
        sums = EVALUATE(self, data, count, best=best)
        if count != 24 or best:
            return sums
        calls.append(0)
        return sums | {"correct": np.asarray(accuracies[len(calls) - 1])}

    monkeypatch.setattr(SeedStates, "evaluate", evaluated)


@pytest.mark.slow
@pytest.mark.parametrize("retrain", [False, True])
def test_patience_ends_the_run_and_no_seed_depends_on_the_other(recipe, tmp_path, monkeypatch, retrain):
    """Seed 0 gives up after epoch 3, its better epoch 5 comes too late; seed 1 after epoch 6."""
    accuracies = [[10, 5], [9, 6], [8, 7], [9, 8], [24, 7], [24, 6], [24, 24], [24, 24]]
    patient = dataclasses.replace(recipe, patience=2, epochs=8, seed_mode="loop", retrain=retrain)
    scripted(monkeypatch, accuracies)
    result = train(patient, options(tmp_path / "run"))
    assert result["selected_epoch"] == [1, 4] and result["validation_accuracy"]["each"] == [10 / 24, 8 / 24]
    assert result["early_stopping"] == {"patience": 2, "epochs": 6}
    assert [line["stage"] for line in metrics(tmp_path / "run")] == ["train"] * 6 + ["retrain"] * (4 if retrain else 0)


@pytest.mark.slow
def test_a_patient_run_that_is_killed_stops_where_it_would_have(recipe, tmp_path, monkeypatch, capsys):
    """Also after its last epoch, and in the second stage, whose first one was shorter than `epochs`."""
    accuracies = [[10, 9], [9, 8], [8, 7]]
    patient = dataclasses.replace(recipe, patience=2, epochs=8, seed_mode="loop", retrain=True)
    scripted(monkeypatch, accuracies)
    whole = train(patient, options(tmp_path / "whole"))
    assert whole["early_stopping"]["epochs"] == 3 and whole["selected_epoch"] == [1, 1]
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_next_stage", lambda self: (_ for _ in ()).throw(Killed()))
        scripted(patch, accuracies)
        with pytest.raises(Killed):
            train(patient, options(tmp_path / "run"))
    with monkeypatch.context() as patch:
        scripted(patch, accuracies[2:])
        patch.setattr("pspinal_jax.runs.train.make_result", lambda *arguments: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(patient, options(tmp_path / "run"))
    capsys.readouterr()
    resumed = train(patient, options(tmp_path / "run"))
    assert "damaged" not in capsys.readouterr().err
    assert resumed["early_stopping"] == whole["early_stopping"]
    assert resumed["selected_checksum"] == whole["selected_checksum"]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


REFUSED = {
    "--augment.mixup -1": "--augment.mixup is -1.0, expected at least 0 and at most 100",
    "--augment.color-jitter 2": "--augment.color-jitter is 2.0, expected at least 0 and at most 1",
    "--augment.min-area 0": "--augment.min-area is 0.0, expected at most 1 and above 0",
    "--ema-decay 1": "--ema-decay is 1.0, expected at least 0 and below 1",
    "--gradient-clip -1": "--gradient-clip is -1.0, expected at least 0",
    "--patience -1": "patience is -1, expected at least 0",
    "--patience 3 --data.num-validation 0": "patience is 3, expected 0 where nothing is held out",
    "--patience 3 --protocol paper": "patience is 3, expected 0 with --protocol paper",
    "--ema-decay 0.9 --protocol paper": "--ema-decay is 0.9, expected 0 with --protocol paper",
    "--class-weights balanced --sampler balanced": "--class-weights is balanced, expected none with --sampler balanced",
    "--sampler balanced --data.no-shuffle": "sampler is balanced, expected none without --data.shuffle",
    "--optimizer.warmup-epochs 30 --epochs 20": "--optimizer.warmup-epochs is 30.0, expected fewer than",
    "--optimizer.backbone-rate 0": "--optimizer.backbone-rate is 0.0, expected above 0",
    "--class-weights even": "class-weights",
    "--data.fit stretch": "fit",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_values_are_one_line(flags, npz_path, tmp_path, capsys):
    command = ["train", "digits", "--data.path", str(npz_path), "--data.num-classes", "3", "--batch-size", "16"]
    held_out = [] if "num-validation" in flags else ["--data.num-validation", "24"]
    assert main([*command, *held_out, "--workdir", str(tmp_path / "run"), *flags.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and REFUSED[flags] in line
    assert not (tmp_path / "run").exists()
