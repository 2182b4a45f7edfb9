"""Whatever comes in from outside, only clear errors come out: flags, .npz files, folders of pictures, checkpoints.

Cases are drawn by hypothesis, the same ones every time. In process nothing is compiled: a run is stopped where its
set-up ends.
"""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pspinal_jax.__main__ import main
from pspinal_jax.data.folder import read_folder
from pspinal_jax.data.images.decode import decode
from pspinal_jax.data.npz import read_npz
from pspinal_jax.errors import DataError, PSpinalError, RunError, UsageError
from pspinal_jax.models import build_model
from pspinal_jax.recipes import list_recipes
from pspinal_jax.runs import train as train_module
from pspinal_jax.training.loop import Stopped

pytestmark = pytest.mark.slow


def cases(count):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


NUMBERS = st.one_of(
    st.sampled_from(
        ["0", "-1", "1", "2", "3", "7", "16", "1e3", "1e-3", "0.5", "nan", "inf", "-inf", "1e400", "", "x", "٣"]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
)
NUMERIC = [
    "--epochs", "--batch-size", "--eval-batch-size", "--seed", "--num-seeds", "--label-smoothing", "--rounds",
    "--micro-batches", "--feature-views", "--checkpoint-seconds", "--workers", "--data.num-classes", "--data.mean",
    "--data.std", "--data.num-validation", "--data.split-seed", "--data.image-size", "--data.resize",
    "--data.validation-fraction", "--data.test-fraction", "--model.layer-width", "--model.num-layers",
    "--model.dropout-rate", "--model.layer-dropout-rate", "--optimizer.learning-rate", "--optimizer.momentum",
    "--optimizer.weight-decay", "--optimizer.warmup-fraction", "--optimizer.decay-epochs",
]  # fmt: skip
FLAGS = {
    **dict.fromkeys(NUMERIC, NUMBERS),
    "--model.backbone": st.sampled_from(["none", "vgg5", "resnet18", "wide_resnet101_2", "resnet19", ""]),
    "--model.head": st.sampled_from(["progressive", "spinal", "mlp", "dense", "Dense"]),
    "--model.norm": st.sampled_from(["none", "batch", "layer"]),
    "--model.implementation": st.sampled_from(["auto", "unrolled", "fused", "scan", "loop"]),
    "--model.weights": st.sampled_from(["None", "pretrained", "no/such.safetensors", "hf:", "hf:a/b", "x.pt"]),
    "--optimizer.name": st.sampled_from(["sgd", "adam", "adamw", "lion"]),
    "--optimizer.schedule": st.sampled_from(["constant", "cosine", "one_cycle", "step", "linear"]),
    "--optimizer.steering": st.sampled_from(["none", "best_on_test"]),
    "--protocol": st.sampled_from(["validation", "paper", "test"]),
    "--freeze": st.sampled_from(["none", "backbone", "head"]),
    "--dtype": st.sampled_from(["float32", "bfloat16", "float8"]),
    "--seed-mode": st.sampled_from(["auto", "loop", "vmap"]),
    "--data.augment": st.sampled_from(["none", "perspective_rotation", "rotation_crop_flip"]),
    "--data.name": st.sampled_from(["digits", "mnist", "no_such", "emnist/letters", "", "../x"]),
    "--data.path": st.sampled_from(
        ["data.npz", "features.npz", "pictures", "none.npz", ".", "broken.npz", "", "/dev/null"]
    ),
    "--init-from": st.sampled_from(["no_run", ".", "data.npz"]),
    **dict.fromkeys(
        ["--retrain", "--cache-features", "--data.transposed", "--data.strict", "--model.remat"], st.just(None)
    ),
    "--no-such-flag": NUMBERS,
}
OVERRIDES = st.lists(
    st.sampled_from(sorted(FLAGS)).flatmap(lambda name: st.tuples(st.just(name), FLAGS[name])), max_size=5
).map(lambda pairs: [word for pair in pairs for word in pair if word is not None])
RECIPES = st.sampled_from([*list_recipes(), "digit", "", "own.py", "broken.py", "--epochs"])
LOCAL = ["--data.path", "data.npz"]


def write_inputs(folder):
    """What the flags above speak of."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    images = rng.integers(0, 256, (40, 28, 28)).astype(np.uint8)
    np.savez(folder / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    features = rng.normal(size=(40, 6)).astype(np.float32)
    np.savez(
        folder / "features.npz", train_images=features, train_labels=labels, test_images=features, test_labels=labels
    )
    (folder / "broken.npz").write_bytes((folder / "data.npz").read_bytes()[:900])
    for label in ("a", "b"):
        (folder / "pictures" / label).mkdir(parents=True)
        for index in range(8):
            Image.fromarray(images[index]).save(folder / "pictures" / label / f"{index}.png")
    (folder / "own.py").write_text("from pspinal_jax.recipes import load_recipe\nrecipe = load_recipe('mnist')\n")
    (folder / "broken.py").write_text("recipe = 1 /\n")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(write_inputs(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def stop_after_set_up(recipe, data, *rest):
    """In place of compiling: the model's shapes, and as if the user had stopped the run."""
    shape, dtype = data.example_shape, data.example_dtype
    model = build_model(recipe, shape, data.num_classes)
    inputs = jax.ShapeDtypeStruct((2, *shape), dtype)
    jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), inputs)
    raise Stopped("SIGTERM")


def call(args):
    """(exit status, standard error) of the command line, in process."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(args)
        except SystemExit as stop:
            status = stop.code
    return status, errors.getvalue()


def assert_clear(status, errors, args):
    assert status in (0, 1, 2), (args, status)
    assert "Traceback" not in errors, args
    if status and args:  # without any word, usage goes to standard output
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and len(said[0]) > 15, (args, errors)


@cases(1200)
@given(recipe=RECIPES, overrides=OVERRIDES, local=st.booleans())
def test_overrides_of_recipes(place, monkeypatch, recipe, overrides, local):
    monkeypatch.setattr(train_module, "set_up", stop_after_set_up)
    monkeypatch.setattr(
        train_module,
        "cached_features",
        lambda recipe, model, start, data, *rest: stop_after_set_up(recipe, data),
    )
    args = ["train", recipe, *(LOCAL if local else []), *overrides]
    assert_clear(*call(args), args)
    shutil.rmtree(place / "runs", ignore_errors=True)


@cases(150)
@given(words=st.lists(st.text(max_size=8), max_size=4))
def test_any_words(place, words):
    assert_clear(*call(words), words)


ARRAYS = st.fixed_dictionaries(
    {},
    optional={
        name: st.one_of(
            st.tuples(
                st.sampled_from(
                    [
                        *("uint8", "int8", ">i2", "int64", ">u4", "uint64", "float16", "float32", ">f8", "longdouble"),
                        *("bool", "U3", "S3", "complex64", "datetime64[s]", "V4"),
                    ]
                ),
                st.lists(st.integers(0, 5), max_size=4).map(tuple),
                st.integers(0, 3),
            )
        )
        for name in ("train_images", "train_labels", "test_images", "test_labels", "class_names", "validation_images")
    },
)


@cases(1000)
@given(arrays=ARRAYS, classes=st.sampled_from([None, 2, 3]), pickled=st.booleans())
def test_npz_files_of_any_arrays(tmp_path, arrays, classes, pickled):
    made = {}
    for name, (dtype, shape, seed) in arrays.items():
        values = np.random.default_rng(seed).integers(0, 3, shape)
        made[name] = np.zeros(shape, dtype) if dtype == "V4" else values.astype(dtype)
    if pickled:
        made["test_labels"] = np.array([{}], object)
    np.savez(tmp_path / "any.npz", **made)
    with contextlib.suppress(DataError):
        data = read_npz(tmp_path / "any.npz", classes)
        for name, split in data.splits.items():  # whatever is taken is what the file holds
            np.testing.assert_array_equal(split.inputs.ravel(), made[f"{name}_images"].ravel().astype(np.float64))
            np.testing.assert_array_equal(split.labels, made[f"{name}_labels"].astype(np.int64))


@cases(300)
@given(
    position=st.floats(0, 1), length=st.integers(0, 40), content=st.binary(min_size=1, max_size=8), cut=st.booleans()
)
def test_damaged_npz_files(place, position, length, content, cut):
    whole = (place / "data.npz").read_bytes()
    at = int(position * len(whole))
    damaged = whole[:at] if cut else whole[:at] + content + whole[at + length :]
    (place / "damaged.npz").write_bytes(damaged)
    with contextlib.suppress(DataError):
        read_npz(place / "damaged.npz", None)


NAMES = st.sampled_from(
    ["a/1.png", "a/2.jpg", "b/1.png", "b/x/3.png", "1.png", "a/.png", "c/1.txt", "train/a/1.png", "b/ü .jpeg"]
)


@cases(200)
@given(
    files=st.dictionaries(NAMES, st.one_of(st.binary(max_size=30), st.floats(0, 1)), max_size=6),
    strict=st.booleans(),
    fraction=st.sampled_from([0.2, 0.5, 0.99]),
)
def test_folders_of_anything(place, files, strict, fraction):
    folder = place / "anything"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    picture = (place / "pictures" / "a" / "1.png").read_bytes()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(
            picture[: int(content * len(picture)) + 1] if isinstance(content, float) else content
        )
    with contextlib.suppress(DataError, UsageError), contextlib.redirect_stderr(io.StringIO()):
        data = read_folder(folder, image_size=8, test_fraction=fraction, split_seed=0, strict=strict)
        assert data.num_classes >= 2 and len(data.train)
        for index in range(len(data.train)):
            assert decode(data.train.encoded[index], (8, 8)).shape == (8, 8, 3)


def small_flags(folder):
    flags = ["--epochs", "1", "--batch-size", "8", "--model.layer-width", "4", "--data.num-validation", "0"]
    return ["--data.path", str(folder / "features.npz"), *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("finished"))
    assert main(["train", "features", *small_flags(folder), "--workdir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def answers(finished):
    """What each command says of the run as it was."""
    return {command: answer(command, finished) for command in ("train", "evaluate", "export")}


def answer(command, run):
    """(status, errors, what it says of the run): test accuracies and, of an export, its parameters."""
    output = run.parent / "exported"
    shutil.rmtree(output, ignore_errors=True)
    args = {
        "train": ["train", "features", *small_flags(run.parent), "--workdir", str(run)],
        "evaluate": ["evaluate", str(run)],
        "export": ["export", str(run), "--output", str(output)],
    }[command]
    status, errors = call(args)
    if status:
        return status, errors, None
    if command == "export":
        return status, errors, (output / "params.safetensors").read_bytes()
    written = run / {"train": "result.json", "evaluate": "evaluation.json"}[command]
    if not written.is_file():  # scores that cannot be written are printed
        assert "warning: " in errors and written.name in errors
        return status, errors, None
    result = json.loads(written.read_text())
    return status, errors, result["test_accuracy" if command == "train" else "accuracy"]


@cases(300)
@given(
    command=st.sampled_from(["train", "evaluate", "export"]),
    which=st.integers(0, 10**6),
    how=st.sampled_from(["truncate", "empty", "flip", "delete", "directory", "garbage"]),
    position=st.floats(0, 1),
)
def test_damaged_run_directories(finished, answers, tmp_path, command, which, how, position):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished, run)
    shutil.copy(finished.parent / "features.npz", tmp_path)
    files = sorted(path for path in run.rglob("*") if path.is_file())
    path = files[which % len(files)]
    content = bytearray(path.read_bytes())
    at = int(position * max(0, len(content) - 1))
    if how == "truncate":
        path.write_bytes(content[:at])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flip" and content:
        content[at] ^= 0x55
        path.write_bytes(content)
    elif how == "garbage":
        path.write_bytes(np.random.default_rng(which).bytes(50))
    else:
        path.unlink()
        if how == "directory":
            path.mkdir()
    status, errors, said = answer(command, run)
    assert_clear(status, errors, (command, str(path.relative_to(run)), how))
    assert status or said in (None, answers[command][2]), (command, str(path.relative_to(run)), how, errors)


@cases(50)
@given(recipe=RECIPES, overrides=OVERRIDES)
def test_the_command_line_itself(place, recipe, overrides):
    """As its users call it; short by `--epochs 1`, and stopped after a minute."""
    before = snapshot(place.parent)
    args = ["train", recipe, *LOCAL, "--workdir", "work", *overrides, "--epochs", "x"]
    done = subprocess.run(
        [sys.executable, "-m", "pspinal_jax", *args], capture_output=True, text=True, timeout=60, check=False
    )
    assert_clear(done.returncode, done.stderr, args)
    new = {path for path in snapshot(place.parent) - before if "__pycache__" not in path}
    allowed = tuple(str(place.relative_to(place.parent) / name) for name in ("work", "cache", "tfds"))
    assert all(path.startswith(allowed) for path in new), new


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_errors_are_of_three_kinds():
    assert {error.exit_status for error in (UsageError, DataError, RunError)} == {1, 2}
    assert all(issubclass(error, PSpinalError) for error in (UsageError, DataError, RunError))
