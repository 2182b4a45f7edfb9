"""Whole runs, in process, on a data set of 96 images."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_runs import Killed, metrics, options, small_recipe

from pspinal_jax.checkpoints import CheckpointStore
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.recipes import ModelConfig, OptimizerConfig, load_recipe
from pspinal_jax.runs.evaluate import evaluate
from pspinal_jax.runs.result import _best_seed, load_variables
from pspinal_jax.runs.train import train
from pspinal_jax.training import loop as trainer_module
from pspinal_jax.training.examples import InMemoryExamples
from pspinal_jax.training.stages import TrainingProgress, improves
from pspinal_jax.weights import read_variables


@pytest.fixture(scope="module")
def recipe(npz_path):
    return small_recipe(npz_path)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A run that was never interrupted; treat as read-only."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = train(recipe, options(workdir))
    return workdir, result


def read(path):
    return json.loads(path.read_text())


def assert_same_run(one, other):
    chex.assert_trees_all_equal(load_variables(one)[0], load_variables(other)[0])
    assert metrics(one) == metrics(other)
    assert read(one / "result.json")["test_accuracy"] == read(other / "result.json")["test_accuracy"]


def test_a_run_learns_and_leaves_its_files(finished):
    workdir, result = finished
    assert result.items() <= read(workdir / "result.json").items()
    assert result["test_accuracy"]["mean"] > 0.6  # chance is a third
    assert result["protocol"] == "validation" and result["seeds"] == [0] and result["test_examples"] == 50
    assert result["train_examples"] == 72 and len(result["selected_epoch"]) == 1
    lines = metrics(workdir)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and lines[-1]["step"] == 16
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = read(workdir / "config.json")
    assert config["class_names"] == ["0", "1", "2"] and config["versions"]["jax"]
    # Where a run is carried out is recorded, and may be another place when it goes on.
    assert config["mesh"] == {"data": -1, "fsdp": 1, "model": 1} and "mesh" not in config["identity"]


def test_the_selected_epoch_is_the_best_on_validation(finished):
    workdir, result = finished
    seen = [(line["validation_accuracy"], -line["validation_loss"], line["epoch"]) for line in metrics(workdir)]
    accuracy, loss, epoch = max(seen)
    assert result["selected_epoch"] == [epoch]
    assert result["validation_accuracy"]["each"] == [accuracy] and result["validation_loss"]["each"] == [-loss]


@pytest.mark.parametrize(
    ("accuracy", "loss", "best", "expected"),
    [
        (0.6, 9.0, (0.5, 0.1), True),
        (0.4, 0.0, (0.5, 0.1), False),
        (0.5, 0.05, (0.5, 0.1), True),
        (0.5, 0.2, (0.5, 0.1), False),
        (0.5, 0.1, (0.5, 0.1), True),
        (0.5, 0.05, (0.5, None), False),
        (0.6, 9.0, (0.5, None), True),
        (0.5, 9.0, (0.5, float("nan")), True),
        (0.5, float("nan"), (0.5, 0.1), False),
    ],
)
def test_of_tied_epochs_the_lower_loss_is_selected_then_the_later(accuracy, loss, best, expected):
    assert improves([accuracy, 0.0], [loss, 0.0], [best[0], 1.0], [best[1], 0.0]).tolist() == [expected, False]


def test_of_tied_seeds_the_one_with_the_lower_loss_stands_for_the_run():
    recipe, tied = load_recipe("digits"), {"best_accuracy": [0.5, 0.5]}
    assert _best_seed(recipe, TrainingProgress(**tied, best_loss=[0.3, 0.2])) == 1
    assert _best_seed(recipe, TrainingProgress(**tied, best_loss=[0.3, float("nan")])) == 0
    assert _best_seed(recipe, TrainingProgress(**tied)) == _best_seed(recipe, TrainingProgress()) == 0
    assert _best_seed(recipe, TrainingProgress(selected_accuracy=[0.1, 0.2], best_accuracy=[0.5, 0.4])) == 1
    assert _best_seed(load_recipe("mnist-paper"), TrainingProgress(**tied, best_loss=[0.3, 0.2])) == 0


def test_a_run_in_progress_of_before_the_loss_was_kept_goes_on(finished, recipe, tmp_path, monkeypatch):
    """Its checkpoint's progress lacks the fields, as an older version wrote it."""
    whole, calls = trainer_module.Trainer._finish_epoch, [0]

    def dies(self, *args):
        calls[0] += 1
        if calls[0] == 3:
            self.store.finish()
            raise Killed
        whole(self, *args)

    def older(store, serial, trees, progress):
        save(store, serial, trees, {name: progress[name] for name in progress.keys() - {"best_loss", "selected_loss"}})

    save = CheckpointStore.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer_module.Trainer, "_finish_epoch", dies)
        patch.setattr(CheckpointStore, "save", older)
        train(recipe, options(tmp_path / "run"))
    lines = metrics(tmp_path / "run")
    result = train(recipe, options(tmp_path / "run"))
    assert len(lines) == 2 and metrics(tmp_path / "run") == metrics(finished[0])
    assert result["validation_accuracy"] == finished[1]["validation_accuracy"]


def test_evaluate_reports_what_the_run_reported(finished):
    workdir, result = finished
    report = evaluate(workdir)
    assert report["accuracy"] == result["test_accuracy"]["mean"]
    confusion = np.array(report["confusion"])
    assert confusion.sum() == 50 and np.trace(confusion) == report["correct"]
    mistakes = ["mistakes.png"] if report["correct"] < 50 else []
    assert report.pop("files") == ["evaluation.json", "classes.csv", "confusion.png", *mistakes]
    assert report == read(workdir / "evaluation.json")
    assert (workdir / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_trained_again(finished, recipe, monkeypatch):
    workdir, result = finished
    monkeypatch.setattr(trainer_module.Trainer, "run", lambda self: pytest.fail("trained again"))
    assert train(recipe, options(workdir)) == result


def test_test_labels_do_not_influence_training_or_selection(finished, recipe, arrays, tmp_path):
    workdir, result = finished
    labels = (arrays["test_labels"] + 1) % 3
    np.savez(tmp_path / "other.npz", **{**arrays, "test_labels": labels})
    changed = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=tmp_path / "other.npz"))
    other = train(changed, options(tmp_path / "run"))
    assert other["selected_epoch"] == result["selected_epoch"]
    assert metrics(tmp_path / "run") == metrics(workdir)
    chex.assert_trees_all_equal(load_variables(tmp_path / "run")[0], load_variables(workdir)[0])
    assert other["test_accuracy"] != result["test_accuracy"]


@pytest.mark.parametrize("chunks", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 6, 7))])
def test_a_resumed_run_equals_one_that_never_stopped(finished, recipe, tmp_path, monkeypatch, chunks):
    """Dies after some chunks of two steps, in the middle of an epoch or at its end, and goes on."""
    monkeypatch.setattr(trainer_module, "CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(InMemoryExamples, "first_chunk", 2)
    whole, calls = trainer_module.Trainer._chunk_steps, [0]

    def counted(self, remaining):
        calls[0] += 1
        if calls[0] > chunks:
            raise Killed
        return min(2, whole(self, remaining) + 1)

    monkeypatch.setattr(trainer_module.Trainer, "_chunk_steps", counted)
    with pytest.raises(Killed):
        train(recipe, options(tmp_path / "run"))
    monkeypatch.undo()
    train(recipe, options(tmp_path / "run"))
    assert_same_run(tmp_path / "run", finished[0])


def test_a_stop_request_saves_and_the_run_goes_on(finished, recipe, tmp_path, monkeypatch):
    import signal

    monkeypatch.setattr(InMemoryExamples, "first_chunk", 1)
    original = trainer_module.Trainer._chunk_steps

    def send(self, remaining):
        if self.progress.serial == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(self, remaining)

    monkeypatch.setattr(trainer_module.Trainer, "_chunk_steps", send)
    with pytest.raises(trainer_module.Stopped, match="SIGTERM"):
        train(recipe, options(tmp_path / "run"))
    monkeypatch.undo()
    assert not (tmp_path / "run" / "result.json").exists()
    train(recipe, options(tmp_path / "run"))
    assert_same_run(tmp_path / "run", finished[0])


def damage(run, how):
    """Damage the parameters that the newest checkpoint holds as the best; returns its step."""
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for path in [path for path in (newest / "best").rglob("*") if path.is_file() and path.parent.name == "d"]:
        content = bytearray(path.read_bytes())
        if how == "truncated":
            del content[len(content) // 2 :]
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    if how == "emptied":
        shutil.rmtree(newest)
        newest.mkdir()
    return int(newest.name)


@pytest.mark.parametrize(
    "how",
    [pytest.param("truncated", marks=pytest.mark.slow), "flipped", pytest.param("emptied", marks=pytest.mark.slow)],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(finished, recipe, tmp_path, capsys, how):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    step = damage(run, how)
    # Readers take no other checkpoint than the one that the result speaks of; training goes on from the one before.
    with pytest.raises(RunError, match=f"checkpoint {step} in .* is damaged"):
        load_variables(run)
    (run / "result.json").unlink()
    train(recipe, options(run))
    captured = capsys.readouterr().err
    assert f"checkpoint {step} in" in captured and "is damaged" in captured and "using checkpoint" in captured
    assert_same_run(run, finished[0])


def test_without_a_whole_checkpoint_the_run_says_so(finished, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "result.json").unlink()
    damage(run, "truncated")
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest)
    damage(run, "flipped")
    with pytest.raises(RunError, match="no whole checkpoint is left"):
        train(recipe, options(run))


@pytest.fixture(scope="module")
def single_runs(recipe, tmp_path_factory):
    """The recipe of one seed, and of the seeds 0 and 1 the run directory and the result."""
    # Plain descent: Adam would blow up the last bits in which a vectorised program differs.
    recipe = dataclasses.replace(recipe, optimizer=OptimizerConfig("sgd", learning_rate=0.05), num_seeds=1)
    runs = [tmp_path_factory.mktemp("single") / f"seed_{seed}" for seed in (0, 1)]
    return recipe, runs, [train(dataclasses.replace(recipe, seed=seed), options(run)) for seed, run in enumerate(runs)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_seed_j_equals_the_single_run_with_that_seed(single_runs, tmp_path, mode):
    recipe, runs, singles = single_runs
    result = train(dataclasses.replace(recipe, num_seeds=2, seed_mode=mode), options(tmp_path / "both"))
    each = [single["test_accuracy"]["mean"] for single in singles]
    assert result["test_accuracy"]["each"] == each
    assert result["test_accuracy"]["mean"] == pytest.approx(np.mean(each))
    assert result["test_accuracy"]["std"] == pytest.approx(np.std(each, ddof=1))
    for index, run in enumerate(runs):
        ours, theirs = load_variables(tmp_path / "both", index)[0], load_variables(run)[0]
        if mode == "loop":
            chex.assert_trees_all_equal(ours, theirs)
        else:
            chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)
        losses = [line["train_loss"][index] for line in metrics(tmp_path / "both")]
        np.testing.assert_allclose(losses, [line["train_loss"] for line in metrics(run)], rtol=1e-5)
    # The default seed is the best on validation, of equal ones by the loss.
    best = int(np.lexsort([-np.array(result["validation_loss"]["each"]), result["validation_accuracy"]["each"]])[-1])
    chex.assert_trees_all_equal(load_variables(tmp_path / "both")[0], load_variables(tmp_path / "both", best)[0])
    with pytest.raises(UsageError, match=r"seed_index is 2, expected 0 \.\. 1"):
        load_variables(tmp_path / "both", 2)


def test_retraining_uses_all_training_data_for_the_selected_epochs(finished, recipe, tmp_path):
    again = dataclasses.replace(recipe, retrain=True)
    result = train(again, options(tmp_path / "run"))
    selected = finished[1]["selected_epoch"]
    assert result["selected_epoch"] == selected and result["train_examples"] == 96
    lines = metrics(tmp_path / "run")
    assert lines[:4] == metrics(finished[0])
    assert [line["stage"] for line in lines[4:]] == ["retrain"] * selected[0]
    assert not any("validation_accuracy" in line for line in lines[4:])
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as checkpoints:
        items = {name: ocp.args.StandardRestore() for name in ("params", "best")}
        last = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.Composite(**items))
    chex.assert_trees_all_equal(last["best"]["params"], last["params"])  # kept is the selected epoch, the last one here


@pytest.mark.slow
def test_the_papers_protocol_reports_last_and_best_on_test(recipe, tmp_path):
    paper = dataclasses.replace(
        recipe, protocol="paper", data=dataclasses.replace(recipe.data, drop_remainder=False), batch_size=20
    )
    result = train(paper, options(tmp_path / "run"))
    lines = metrics(tmp_path / "run")
    accuracies = [line["test_accuracy"] for line in lines]
    assert result["train_examples"] == 96 and lines[0]["step"] == 5  # four whole batches and a tail of 16
    assert result["last_test_accuracy"]["each"] == [accuracies[-1]] == result["test_accuracy"]["each"]
    assert result["best_on_test_accuracy"]["each"] == [max(accuracies)]
    assert "selected on the test split" in result["selection"]
    assert evaluate(tmp_path / "run")["accuracy"] == accuracies[-1]


@pytest.mark.slow
def test_rounds_go_on_from_the_best_and_steering_follows_the_test_accuracy(recipe, tmp_path):
    """The published QMNIST chain, and the published scripts' way with the learning rate."""
    optimizer = dataclasses.replace(
        recipe.optimizer, name="adam", weight_decay=0.0, schedule="constant", steering="best_on_test"
    )
    paper = dataclasses.replace(recipe, protocol="paper", rounds=2, optimizer=optimizer)
    result = train(paper, options(tmp_path / "run"))
    lines = metrics(tmp_path / "run")
    assert [line["stage"] for line in lines] == ["round_1"] * 4 + ["round_2"] * 4
    first, second = ([line["test_accuracy"] for line in part] for part in (lines[:4], lines[4:]))
    assert result["last_test_accuracy"]["each"] == [second[-1]]
    assert result["best_on_test_accuracy"]["each"] == [max(second)]
    for part, accuracies in ((lines[:4], first), (lines[4:], second)):
        rates = [line["learning_rate"] for line in part]
        assert rates[0] == pytest.approx(optimizer.learning_rate)
        for epoch in range(1, 4):
            beaten = accuracies[epoch - 1] > max(accuracies[: epoch - 1], default=-1.0)
            assert (rates[epoch] == rates[epoch - 1]) == beaten
            assert rates[epoch] <= optimizer.learning_rate * (1 + 1e-6)
    # The second round starts from round 1's best: its first epoch cannot be a beginner's.
    assert lines[4]["train_loss"] < lines[0]["train_loss"]


def test_without_validation_data_the_last_epoch_is_taken(recipe, tmp_path):
    plain = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, num_validation=0), epochs=2)
    result = train(plain, options(tmp_path / "run"))
    assert result["selected_epoch"] == [2] and "validation_accuracy" not in result
    assert "last epoch" in result["selection"]


def test_init_from_starts_from_the_other_runs_parameters(finished, recipe, tmp_path):
    tiny = dataclasses.replace(recipe.optimizer, learning_rate=1e-12)
    changed = dataclasses.replace(recipe, optimizer=tiny, epochs=1)
    train(changed, options(tmp_path / "run", init_from=finished[0]))
    chex.assert_trees_all_close(
        load_variables(tmp_path / "run")[0]["params"], load_variables(finished[0])[0]["params"], atol=1e-6
    )
    wider = dataclasses.replace(recipe, model=ModelConfig(layer_width=7, num_layers=3, norm="batch"))
    with pytest.raises(UsageError, match=r"init_from .* does not fit this model: head/layer_1/bias is \(6,\)"):
        train(wider, options(tmp_path / "wider", init_from=finished[0]))


@pytest.mark.slow
def test_init_from_keeps_hidden_layers_and_statistics_where_the_classes_are_others(
    finished, recipe, arrays, tmp_path, capsys
):
    np.savez(tmp_path / "named.npz", **arrays, class_names=np.array(["a", "b", "c", "d"]))
    tiny = dataclasses.replace(recipe.optimizer, learning_rate=1e-12)
    data = dataclasses.replace(recipe.data, path=tmp_path / "named.npz", num_classes=4)
    train(dataclasses.replace(recipe, optimizer=tiny, data=data), options(tmp_path / "run", init_from=finished[0]))
    assert "has 3 classes, not the 4 of this data: the output layer is initialised anew" in capsys.readouterr().err
    before, start = load_variables(finished[0])[0], read_variables(tmp_path / "run" / "start.safetensors")
    after = load_variables(tmp_path / "run")[0]["params"]["head"]
    assert after.pop("output")["kernel"].shape[-1] == 4 and before["params"]["head"].pop("output")
    chex.assert_trees_all_close(after, before["params"]["head"], atol=1e-6)
    chex.assert_trees_all_equal(start, before)
    assert start["batch_stats"]


def test_resuming_on_data_that_has_changed_says_what_has(recipe, arrays, tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays, class_names=np.array(["a", "b", "c"]))
    here = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, path=path, num_classes=None), epochs=1, num_seeds=1
    )
    train(here, options(tmp_path / "run"))
    labels = (arrays["train_labels"] + 1) % 3
    np.savez(path, **{**arrays, "train_labels": labels}, class_names=np.array(["a", "b", "other"]))
    with pytest.raises(UsageError, match=r"other data: .*data.npz has the new classes other; choose"):
        train(here, options(tmp_path / "run"))
    np.savez(path, **{**arrays, "train_labels": labels}, class_names=np.array(["a", "b", "c"]))
    with pytest.raises(UsageError, match=r"has had examples added, removed or changed; choose"):
        train(here, options(tmp_path / "run"))


def test_bfloat16_trains_with_float32_parameters(recipe, tmp_path):
    train(dataclasses.replace(recipe, dtype="bfloat16", epochs=1), options(tmp_path / "run"))
    variables, *_ = load_variables(tmp_path / "run")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}


def test_features_train_like_images(recipe, arrays, tmp_path):
    features = {f"{part}_images": arrays[f"{part}_images"].reshape(-1, 16) / 255 for part in ("train", "test")}
    np.savez(tmp_path / "features.npz", **{**arrays, **features})
    config = dataclasses.replace(recipe.data, path=tmp_path / "features.npz", mean=0.0, std=1.0)
    result = train(dataclasses.replace(recipe, data=config, epochs=2), options(tmp_path / "run"))
    assert 0 <= result["test_accuracy"]["mean"] <= 1
    assert read(tmp_path / "run" / "config.json")["input_shape"] == [16]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["spinal", "mlp", "dense"])
def test_baseline_heads_train(recipe, tmp_path, head):
    model = dataclasses.replace(recipe.model, head=head)
    result = train(dataclasses.replace(recipe, model=model, epochs=1), options(tmp_path / "run"))
    assert result["head"] == head and evaluate(tmp_path / "run")["examples"] == 50
