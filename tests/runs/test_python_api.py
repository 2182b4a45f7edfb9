"""The Python API: the same runs, answers and refusals as the command line's."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.errors import DataError, RunError, UsageError
from pspinal_jax.recipes import DataConfig, load_recipe
from pspinal_jax.runs import predict as predict_module

SETTINGS = {"data.num_classes": 3, "epochs": 1, "batch-size": 16, "eval_batch_size": 16, "data__num_validation": 20}


@pytest.fixture(scope="module")
def run(npz_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("api") / "run"
    return pspinal_jax.train("digits", data__path=str(npz_path), workdir=str(workdir), **SETTINGS)


def test_training_again_by_the_command_finds_the_finished_run(run, npz_path, capsys):
    flags = ["--data.num-classes", "3", "--epochs", "1", "--batch-size", "16", "--eval-batch-size", "16"]
    flags += ["--data.num-validation", "20"]
    assert main(["train", "digits", "--data.path", str(npz_path), "--workdir", str(run.path), *flags]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert run.result.items() <= json.loads((run.path / "result.json").read_text()).items()
    assert run.recipe.batch_size == 16 and run.recipe.data.path == npz_path and run.class_names == ("0", "1", "2")


def test_a_loaded_run_answers_as_the_commands_do(run, arrays, tmp_path, capsys):
    loaded = pspinal_jax.load_run(str(run.path))
    assert loaded.evaluate()["accuracy"] == pytest.approx(loaded.result["test_accuracy"]["mean"])
    inputs = arrays["test_images"][:7, ..., None]
    logits = np.asarray(loaded.model.apply(loaded.variables, inputs, train=False))
    paths = [tmp_path / f"{index}.png" for index in range(7)]
    for path, image in zip(paths, inputs, strict=True):
        Image.fromarray(image[..., 0]).save(path)
    assert main(["predict", str(run.path), *map(str, paths), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    given = [inputs, inputs[..., 0], list(inputs), paths, [str(path) for path in paths], [Image.open(p) for p in paths]]
    given.append([inputs[0], str(paths[1]), paths[2], Image.fromarray(inputs[3, ..., 0]), *np.repeat(inputs[4:], 3, 3)])
    for images in given:
        found = loaded.predict(images)
        assert [each.classes[0][0] for each in found] == [str(index) for index in logits.argmax(1)]
        probabilities = [entry["classes"][0]["probability"] for entry in printed]
        np.testing.assert_allclose([each.classes[0][1] for each in found], probabilities, atol=1e-6)
    assert [each.path for each in loaded.predict(given[-1])] == [None, *paths[1:3], *[None] * 4]
    assert loaded.predict([]) == []


def test_a_run_shows_its_history_and_gives_probabilities_as_an_array(run, arrays):
    assert [line["epoch"] for line in run.history if line["stage"] == "train"] == [1]
    assert len(run.history.to_pandas()) == len(run.history) and "validation_loss" in run._repr_html_()
    assert [axis.get_ylabel() for axis in run.plot().axes] == ["loss", "accuracy (%)"]
    inputs = arrays["test_images"][:5, ..., None]
    logits = np.asarray(run.model.apply(run.variables, inputs, train=False))
    found = run.predict_proba(inputs)
    np.testing.assert_allclose(found, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)
    with pytest.raises(DataError, match=r"image 1, .*nowhere\.png, cannot be read"):
        run.predict_proba([inputs[0], "nowhere.png"])


def test_predict_and_evaluate_again_neither_load_nor_compile_again(run, arrays, monkeypatch):
    loads, load = [], predict_module.load_variables
    monkeypatch.setattr(predict_module, "load_variables", lambda *words: loads.append(words) or load(*words))
    loaded, inputs = pspinal_jax.load_run(run.path), arrays["test_images"]
    first = loaded.predict(inputs[:8])
    loaded.evaluate()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: compiled.append(event))
    try:
        again = [loaded.predict(inputs[:count]) for count in (5, 6, 7, 8)]
        loaded.evaluate()
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(loads) == 1 and not [event for event in compiled if "compile" in event or "jaxpr_trace" in event]
    assert all(each == first[: len(each)] for each in again)
    assert pickle.loads(pickle.dumps(loaded)).predict(inputs[:8]) == first


def test_an_image_that_pillow_has_opened_stays_as_it_is_and_is_read_as_its_file(run, tmp_path):
    turned = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    opened = Image.open(tmp_path / "turned.png")
    by_path, by_image = run.predict([tmp_path / "turned.png", opened])
    assert by_path.classes == by_image.classes and opened.size == (8, 6)


def test_a_file_that_cannot_be_read_has_its_error_and_the_others_their_classes(run, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    broken, missing, good = run.predict([tmp_path / "broken.png", tmp_path / "none.png", np.zeros((4, 4), np.uint8)])
    assert "cannot be decoded" in broken.error and missing.error == "No such file or directory" and good.error is None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("one.png", "expected several images"),
        (np.zeros((4, 4, 1), np.uint8), r"an array \[4, 4, 1\], expected several images"),
        ([np.zeros((4, 4))], r"an array float64 \[4, 4\], expected uint8"),
        ([np.zeros((4, 4, 2), np.uint8)], r"uint8 \[4, 4, 2\]"),
        ([np.zeros((0, 4), np.uint8)], r"uint8 \[0, 4\]"),
        ([None], r"object \[\]"),
    ],
)
def test_what_is_no_image_is_refused(run, images, message):
    with pytest.raises(UsageError, match=message):
        run.predict(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epocs": 3}, "no setting 'epocs'"),
        ({"model__layer_widht": 3}, "no setting 'model.layer_widht'"),
        ({"card__name": "mine"}, "no setting 'card.name'"),
        ({"epochs": "3"}, "epochs is '3', expected int"),
        ({"epochs": True}, "epochs is True, expected int"),
        ({"epochs": 2.5}, "epochs is 2.5, expected int"),
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"model__head": "big"}, "model.head is 'big', expected 'progressive' or 'spinal'"),
        ({"retrain": 1}, "retrain is 1, expected bool"),
        ({"data__mean": (0.5, 0.5)}, "data.mean"),
        ({"workers": "two"}, "workers is 'two', expected int"),
        ({"data": {"path": "x"}}, "data is {'path': 'x'}, expected DataConfig"),
    ],
)
def test_a_wrong_setting_gets_one_line_and_writes_nothing(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        pspinal_jax.train("digits", **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_settings_become_the_recipes_types(monkeypatch):
    """Numpy's numbers, text for paths, several that fit only together, a config given whole."""
    seen = []
    monkeypatch.setattr("pspinal_jax.runs.run.train_recipe", lambda *given: seen.append(given))
    monkeypatch.setattr("pspinal_jax.runs.run.Run", lambda path: path)
    path = pspinal_jax.train(
        load_recipe("digits"),
        epochs=np.int64(4),
        optimizer__learning_rate=1,
        data=DataConfig("digits"),
        data__path="x.npz",
        data__mean=[0.1, 0.2, np.float32(0.5)],
        model__weights=None,
        data__num_validation=0,
        retrain=False,
        workdir="here",
    )
    ((recipe, options),) = seen
    assert (type(recipe.epochs), recipe.epochs, type(recipe.optimizer.learning_rate)) == (int, 4, float)
    assert recipe.data.path == Path("x.npz") and recipe.data.mean == (0.1, 0.2, 0.5)
    assert options.workdir == path == Path("here")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not a run directory"):
        pspinal_jax.load_run(tmp_path)
    with pytest.raises(UsageError, match="unknown recipe 'digit'"):
        pspinal_jax.train("digit")


def test_an_unfinished_run_has_no_result(run, tmp_path):
    (tmp_path / "config.json").write_bytes((run.path / "config.json").read_bytes())
    with pytest.raises(RunError, match="not finished"):
        _ = pspinal_jax.load_run(tmp_path).result
    with pytest.raises(UsageError, match="seed_index is 1"):
        _ = pspinal_jax.load_run(run.path, seed_index=1).variables


def test_a_users_own_process_sees_nothing_of_orbax_and_keeps_its_log(run):
    code = (
        "import sys, pspinal_jax, absl.logging, logging\n"
        "run = pspinal_jax.load_run(sys.argv[1]); run.variables; run.evaluate()\n"
        "absl.logging.warning('my own'); print(logging.getLogger('absl').filters)"
    )
    done = subprocess.run([sys.executable, "-c", code, run.path], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "WARNING:absl:my own" and done.stdout.strip() == "[]"


def test_the_api_costs_nothing_until_it_is_used():
    code = (
        "import sys, pspinal_jax; assert {'train', 'load_run', 'Run'} <= set(dir(pspinal_jax))\n"
        "print(sorted({'jax', 'numpy', 'PIL', 'orbax', 'tyro', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
