"""Exports: what a run's classifier becomes, used without this package."""

import builtins
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from PIL import Image
from small_runs import Killed

from pspinal_jax.__main__ import main
from pspinal_jax.commands.tools import ending_exports
from pspinal_jax.errors import RunError
from pspinal_jax.heads import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.models import Classifier, build_model
from pspinal_jax.runs import export
from pspinal_jax.runs.directory import load_recipe_of
from pspinal_jax.runs.export import export_classifier, read_export
from pspinal_jax.runs.result import load_variables
from pspinal_jax.weights import read_variables

JAX_ALONE = ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers")
DOCS = Path(__file__).parents[2] / "docs" / "export.md"
BATCHES = (1, 7, 64)
SMALL = ["--epochs", "4", "--batch-size", "16", "--eval-batch-size", "16", "--data.num-validation", "20"]

ELSEWHERE = """
import sys
sys.path.append(sys.argv[1])
import numpy as np
everything, results = np.load(sys.argv[2]), []
for size in (1, 7, 64):
    images = everything[:size]
    exec(open(sys.argv[3]).read())
    results.append(np.asarray(probabilities))
np.save(sys.argv[4], np.concatenate(results))
strangers = {"pspinal_jax", "flax", "optax", "orbax", "safetensors", "PIL"}
for name in strangers:
    try:
        __import__(name)
    except ImportError:
        strangers = strangers - {name}
assert not strangers, strangers
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with JAX and what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    for name in JAX_ALONE:
        spec = importlib.util.find_spec(name)
        source = Path(next(iter(spec.submodule_search_locations)))
        for path in (source, source.with_name(f"{name}.libs")):
            if path.exists():
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def lines():
    """The lines that the docs give to load an export."""
    block = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    assert 1 <= len([line for line in block.splitlines() if line]) <= 5
    return block


@pytest.fixture(scope="module")
def trained(npz_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("export") / "run"
    data = ["--data.path", str(npz_path), "--data.num-classes", "3"]
    assert main(["train", "digits", "--workdir", str(workdir), *data, "--data.transposed", *SMALL]) == 0
    return workdir


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "mine"
    assert main(["export", str(trained), "--output", str(path)]) == 0
    return path


def elsewhere(site, lines, export, inputs, tmp_path):
    """Probabilities of batches of 1, 7 and 64 of `inputs`, by the docs' lines in a process that has JAX alone."""
    np.save(tmp_path / "inputs.npy", inputs)
    (tmp_path / "lines.py").write_text(lines.replace("mnist-export/", f"{export}/"))
    arguments = [site, tmp_path / "inputs.npy", tmp_path / "lines.py", tmp_path / "out.npy"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ELSEWHERE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / "out.npy")


def of_run(run, inputs):
    """The same by the run's own model, computed at once."""
    variables, config, _ = load_variables(run)
    recipe = load_recipe_of(config)
    model = build_model(recipe, inputs.shape[1:], len(config["class_names"]))
    inputs = inputs.swapaxes(1, 2) if recipe.data.transposed else inputs
    expected = np.asarray(jax.nn.softmax(jax.jit(model.apply, static_argnums=2)(variables, inputs, False)))
    assert np.ptp(expected, axis=0).max() > 0.01, "the rows must differ for a comparison to mean anything"
    return np.concatenate([expected[:size] for size in BATCHES])


def predictions(capsys, *arguments):
    capsys.readouterr()
    assert main(["predict", *map(str, arguments), "--json", "--top", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [[entry["class"] for entry in picture["classes"]] for picture in found]
    return names, np.array([[entry["probability"] for entry in picture["classes"]] for picture in found])


def assert_the_same_predictions(capsys, run, export, pictures):
    names, probabilities = predictions(capsys, run, *pictures)
    for arguments in (["--artifact", export, *pictures], [export, *pictures]):
        again = predictions(capsys, *arguments)
        assert again[0] == names
        np.testing.assert_allclose(again[1], probabilities, rtol=0, atol=2e-6)


def test_an_export_gives_the_runs_probabilities_with_jax_alone(trained, exported, site, lines, tmp_path, capsys):
    images = np.random.default_rng(1).integers(0, 256, (64, 4, 4, 1)).astype(np.uint8)
    found = elsewhere(site, lines, exported, images, tmp_path)
    np.testing.assert_allclose(found, of_run(trained, images), rtol=0, atol=1e-6)
    pictures = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(pictures, images, strict=False):
        Image.fromarray(image[..., 0]).save(path)
    assert_the_same_predictions(capsys, trained, exported, pictures)


def test_what_is_written_beside_the_program(trained, exported):
    variables, config, _ = load_variables(trained)
    back = read_variables(exported / "params.safetensors")
    chex.assert_trees_all_equal(back, jax.device_get(variables))
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1, "all readable by the same people"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(back)} == {"float32"} and set(back) == set(variables)
    said = json.loads((exported / "export.json").read_text())
    assert said["class_names"] == ["0", "1", "2"] and said["recipe"] == "digits"
    assert said["input"] == {"shape": ["N", 4, 4, 1], "dtype": "uint8"}
    assert said["test_accuracy"] == json.loads((trained / "result.json").read_text())["test_accuracy"]["mean"]
    assert said["exported_with"]["jax"] == jax.__version__ and said["trained_with"] == config["versions"]
    program = read_export(exported).exported
    assert program.platforms == ("cpu", "cuda", "tpu") and program.nr_devices == 1
    assert not program.disabled_safety_checks


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="whole", marks=pytest.mark.slow),
        pytest.param(["--freeze", "backbone", "--cache-features"], id="cached", marks=pytest.mark.slow),
    ],
)
def test_a_run_on_photographs(pictures, tiny_flags, site, lines, tmp_path, capsys, flags):
    run = tmp_path / "run"
    words = ["--model.layer-width", "8", "--epochs", "2", "--eval-batch-size", "8", "--data.validation-fraction", "0.2"]
    assert (
        main(["train", "folder", "--data.path", str(pictures), "--workdir", str(run), *tiny_flags, *words, *flags]) == 0
    )
    assert main(["export", str(run)]) == 0
    images = np.random.default_rng(1).integers(0, 256, (64, 32, 32, 3)).astype(np.uint8)
    images[::2] //= 4
    found = elsewhere(site, lines, run / "export", images, tmp_path)
    np.testing.assert_allclose(found, of_run(run, images), rtol=0, atol=1e-6)
    assert_the_same_predictions(capsys, run, run / "export", sorted(pictures.glob("*/000.jpg")))


@pytest.mark.parametrize(
    "head",
    [
        ProgressiveSpinalHead(3, 4, num_layers=3, norm="batch", implementation="scan"),
        ProgressiveSpinalHead(3, 4, num_layers=2, dtype=jnp.bfloat16),
        SpinalHead(3, 4),
        MLPHead(3, 4),
        DenseHead(3),
    ],
    ids=["scan", "bfloat16", "spinal", "mlp", "dense"],
)
def test_every_head_is_exported_with_an_open_batch(head):
    model = Classifier(head, mean=0.2, std=0.3, dtype=head.dtype)
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 1)).astype(np.uint8)
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images)
    found = export_classifier(model, variables, (6, 6, 1), np.uint8).call(images)
    expected = jax.nn.softmax(jax.jit(model.apply, static_argnums=2)(variables, images, False).astype(jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 if head.dtype == jnp.bfloat16 else 1e-6)


def test_a_transposed_run_takes_upright_images():
    model = Classifier(DenseHead(3))
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 1)).astype(np.uint8)
    variables = model.init(jax.random.key(0), images, train=False)
    found = export_classifier(model, variables, (6, 6, 1), np.uint8, transposed=True).call(images)
    expected = jax.nn.softmax(model.apply(variables, images.swapaxes(1, 2), train=False))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_run_on_features_is_exported_and_not_for_pictures(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    features = rng.normal(size=(60, 5)) + labels[:, None]
    arrays = {"train_images": features, "train_labels": labels, "test_images": features, "test_labels": labels}
    np.savez(tmp_path / "features.npz", **arrays)
    flags = ["--data.path", str(tmp_path / "features.npz"), "--epochs", "1", "--batch-size", "16"]
    small = ["--model.head", "dense", "--optimizer.name", "sgd", "--optimizer.weight-decay", "0"]
    run = tmp_path / "run"
    assert main(["train", "features", "--workdir", str(run), *small, *flags]) == 0
    assert main(["export", str(run), "--format", "onnx"]) == 0
    given = features.astype(np.float32)
    np.testing.assert_allclose(onnx_probabilities(run / "export", given), of_run(run, given)[8:], rtol=0, atol=1e-6)
    artifact = read_export(run / "export")
    (inputs,) = artifact.exported.in_avals
    assert (inputs.shape[1:], inputs.dtype) == ((5,), np.float32)
    found = artifact.exported.call(features[:7].astype(np.float32))
    np.testing.assert_allclose(found, of_run(run, features.astype(np.float32))[1:8], rtol=0, atol=1e-6)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    refused(capsys, 2, "trained on features", "predict", "--artifact", run / "export", tmp_path / "a.png")


def onnx_probabilities(export, inputs):
    """What ONNX Runtime makes of `inputs`."""
    session = onnxruntime.InferenceSession(export / "model.onnx")
    (given,) = session.get_inputs()
    assert given.name == ("images" if inputs.dtype == np.uint8 else "features")
    return session.run(["probabilities"], {given.name: inputs})[0]


def test_an_onnx_model_gives_the_runs_probabilities(trained, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["export", str(trained), "--output", str(output), "--format", "onnx"]) == 0
    assert "model.onnx (0.1 MB)" in capsys.readouterr().out
    images = np.random.default_rng(1).integers(0, 256, (64, 4, 4, 1)).astype(np.uint8)
    found = np.concatenate([onnx_probabilities(output, images[:size]) for size in BATCHES])
    np.testing.assert_allclose(found, of_run(trained, images), rtol=0, atol=1e-6)
    said = json.loads((output / "export.json").read_text())
    assert said["onnx"]["checked_on"] == "50 examples of the test split" and said["onnx"]["opset"] == 18
    assert 0 <= said["onnx"]["largest_difference"] <= 1e-6
    assert said["sha256"].keys() == {"model.jaxexport", "model.onnx", "params.safetensors"}
    metadata = onnxruntime.InferenceSession(output / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == ["0", "1", "2"] and json.loads(metadata["input"]) == said["input"]
    assert main(["export", str(trained), "--output", str(output)]) == 0
    assert not (output / "model.onnx").exists(), "an export is replaced whole"


def test_an_onnx_model_that_differs_is_not_written(trained, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    assert main(["export", str(trained), "--output", str(output)]) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    right = export.run_onnx

    def wrong(path, batches):
        assert [len(batch) for batch in batches] == [1, 49]
        return {name: values + 2e-5 for name, values in right(path, batches).items()}

    monkeypatch.setattr(export, "run_onnx", wrong)
    said = (
        "model.onnx was not written: it differs from the run in probabilities by up to 2.0e-05, expected at most 1e-05"
    )
    refused(capsys, 1, said, "export", trained, "--output", output, "--format", "onnx")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_without_its_data_an_onnx_model_is_checked_on_noise(trained, exported, tmp_path, capsys):
    words = ["export", str(exported), "--output", str(tmp_path / "again"), "--format", "onnx"]
    assert main(words) == 0  # an export does not know where its data lay
    assert "model.onnx is checked on noise, as the run's data cannot be read" in capsys.readouterr().err
    said = json.loads((tmp_path / "again" / "export.json").read_text())
    assert said["onnx"]["checked_on"] == "100 examples of noise"
    images = np.random.default_rng(1).integers(0, 256, (64, 4, 4, 1)).astype(np.uint8)
    np.testing.assert_allclose(onnx_probabilities(tmp_path / "again", images), of_run(trained, images)[8:], atol=1e-6)


def test_onnx_without_its_packages_gets_one_line(trained, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *args, **more):
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'", name=name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    refused(
        capsys, 2, "needs onnxruntime; in the checkout: pip install '.[onnx]'", "export", trained, "--format", "onnx"
    )
    assert not (trained / "export").exists()


def test_a_bfloat16_run_is_float32_in_onnx(trained, exported, tmp_path):
    source = export._of_export(exported, None)
    halved = source._replace(recipe=dataclasses.replace(source.recipe, dtype="bfloat16"))
    assert export._write_onnx(halved, tmp_path)["onnx"]["largest_difference"] < 1e-6
    images = np.random.default_rng(1).integers(0, 256, (64, 4, 4, 1)).astype(np.uint8)
    np.testing.assert_allclose(onnx_probabilities(tmp_path, images), of_run(trained, images)[8:], rtol=0, atol=1e-6)


def test_an_export_is_written_again_from_its_own_files(trained, exported, tmp_path, capsys):
    again = tmp_path / "again"
    assert main(["export", str(exported), "--output", str(again)]) == 0
    first, second = (json.loads((path / "export.json").read_text()) for path in (exported, again))
    assert {name for name in first if first[name] != second[name]} <= {"guaranteed_until", "checksum", "sha256"}
    assert (again / "params.safetensors").read_bytes() == (exported / "params.safetensors").read_bytes()
    images = np.random.default_rng(1).integers(0, 256, (7, 4, 4, 1)).astype(np.uint8)
    one, other = (np.asarray(read_export(path).exported.call(images)) for path in (exported, again))
    np.testing.assert_array_equal(one, other)
    assert main(["export", str(again)]) == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["again"]
    refused(capsys, 2, "--seed-index is 0, but", "export", again, "--seed-index", 0)
    second = json.loads((again / "export.json").read_text())
    del second["model"], second["checksum"]
    (again / "export.json").write_text(json.dumps(second))
    refused(capsys, 1, "of a version that did not write what its model is", "export", again)
    assert read_export(again).description["class_names"] == ["0", "1", "2"], "it is still read"


def test_the_export_says_until_when_newer_versions_read_it(exported, tmp_path):
    until = datetime.date.fromisoformat(json.loads((exported / "export.json").read_text())["guaranteed_until"])
    assert 180 <= (until - datetime.date.today()).days <= 184
    for name, text in {
        "mine": {"guaranteed_until": "2026-01-31"},
        "old": {},
        "odd": [],
        "other": {"guaranteed_until": 3},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "export.json").write_text(json.dumps(text))
    (tmp_path / "runs" / "one" / "export").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "export" / "export.json").write_text('{"guaranteed_until": "2026-01-30"}')
    lines = [text for _, text in ending_exports(tmp_path, datetime.date(2026, 2, 1))]
    assert len(lines) == 2 and f"{tmp_path / 'mine'}: JAX" in lines[0] and "until 2026-01-31 only" in lines[0]
    assert f"pspinal-jax export {tmp_path / 'runs' / 'one' / 'export'} writes it again" in lines[1]
    assert not list(ending_exports(tmp_path, datetime.date(2026, 1, 30)))


def refused(capsys, status, said, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: ") and said in line and not printed.out, line


def test_what_cannot_be_exported_gets_one_line(trained, tmp_path, capsys):
    refused(capsys, 1, "nowhere is not a run directory", "export", tmp_path / "nowhere")
    refused(capsys, 2, "--seed-index is 3, expected 0 .. 0", "export", trained, "--seed-index", 3)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((trained / "config.json").read_text())
    refused(capsys, 1, "unfinished is not finished", "export", unfinished)
    assert not list(trained.glob("export*")) and not list(unfinished.glob("export*"))


def test_nothing_but_an_export_is_replaced(trained, tmp_path, capsys):
    output, file = tmp_path / "out", tmp_path / "file"
    output.mkdir()
    file.write_text("words")
    notes = output / "notes.txt"
    notes.write_text("words")
    refused(capsys, 1, "out holds notes.txt and is not an export", "export", trained, "--output", output)
    refused(capsys, 1, "file is a file", "export", trained, "--output", file)
    refused(capsys, 1, "cannot be written", "export", trained, "--output", file / "below")
    refused(capsys, 1, "is not an export", "export", trained, "--output", trained)
    weights = output / "params.safetensors"
    notes.rename(weights)
    refused(capsys, 1, "out holds params.safetensors and is not an export", "export", trained, "--output", output)
    assert weights.read_text() == "words" and file.read_text() == "words"
    weights.unlink()
    assert main(["export", str(trained), "--output", str(output)]) == 0, "an empty directory is filled"
    (output / "export.json").write_text('{"format": "of another program"}')
    refused(capsys, 1, "out holds an export.json that is not an export's", "export", trained, "--output", output)


def test_a_kill_while_exporting_leaves_the_older_export_whole(trained, tmp_path, monkeypatch):
    output = tmp_path / "out"
    words = ["export", str(trained), "--output", str(output)]
    assert main(words) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(export, "save_variables", die)
        main(words)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "what the killed one left is gone"


def test_a_damaged_export_gets_one_line(trained, tmp_path, capsys):
    output, picture = tmp_path / "out", tmp_path / "a.png"
    Image.new("L", (4, 4)).save(picture)
    assert main(["export", str(trained), "--output", str(output)]) == 0
    words = ["predict", "--artifact", output, picture]
    refused(capsys, 2, "--seed-index is 0, but", *words, "--seed-index", 0)
    file = output / "model.jaxexport"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    refused(capsys, 1, "model.jaxexport is damaged", *words)
    file.unlink()
    refused(capsys, 1, "model.jaxexport cannot be read", *words)
    said = output / "export.json"
    for text, message in (("{", "is damaged"), ('{"format": "pspinal_jax export 1"}', "lacks class_names")):
        said.write_text(text)
        refused(capsys, 1, message, *words)
    said.unlink()
    refused(capsys, 1, "is not an export: it has no export.json", *words)
    refused(capsys, 2, "Missing from pspinal-jax predict", "predict", "--artifact", output)
    refused(capsys, 2, "with --artifact, predict takes images only", "predict", trained, *words[1:])
    refused(capsys, 2, "at least one image", "predict", trained)


def test_parameters_too_large_for_the_format_are_refused(monkeypatch):
    monkeypatch.setattr(export, "MAX_BYTES", 100)
    model = Classifier(DenseHead(3))
    variables = model.init(jax.random.key(0), np.zeros((2, 9), np.float32), train=False)
    with pytest.raises(RunError, match="the parameters take"):
        export_classifier(model, variables, (9,), np.float32)


ON_TWO = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 2)
from pspinal_jax.runs.export import read_export
from pspinal_jax.runs.export import export_run
assert jax.local_device_count() == 2
print(read_export(export_run(Path(sys.argv[1]), Path(sys.argv[2]))).exported.nr_devices)
"""


@pytest.mark.slow
def test_exported_on_several_devices_it_runs_on_one(trained, exported, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO, str(trained), str(tmp_path / "out")],
        env={**os.environ, "NPROC": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "1", done.stderr
    images = np.random.default_rng(1).integers(0, 256, (7, 4, 4, 1)).astype(np.uint8)
    one, other = (read_export(path).exported.call(images) for path in (exported, tmp_path / "out"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
