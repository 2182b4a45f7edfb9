"""Data never runs code, and no file is trusted to be one: pipes, devices and vast files are named and not opened."""

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.data import tfds
from pspinal_jax.data.folder import read_folder
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.raw import open_zip
from pspinal_jax.data.tfds import read_prepared
from pspinal_jax.errors import DataError, RunError
from pspinal_jax.files import read_bytes
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.result import load_variables

OPTIONS = {"image_size": 8, "test_fraction": 0.25, "split_seed": 0}


def vast(path):
    with path.open("wb") as file:
        file.truncate(200 * 2**30)  # sparse


NO_FILES = {
    "a named pipe": os.mkfifo,
    "a socket or a device": lambda path: path.symlink_to("/dev/zero"),
    "expected at most": vast,
}
every_kind = pytest.mark.parametrize("kind", NO_FILES)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(6):
            image = Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8))
            image.save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


@every_kind
@pytest.mark.filterwarnings("ignore")
def test_among_the_pictures_they_are_left_out_and_named(folder, kind, capfd, monkeypatch):
    monkeypatch.setenv("PSPINAL_JAX_CACHE", "off")
    NO_FILES[kind](folder / "a" / "odd.png")
    data = read_folder(folder, strict=False, **OPTIONS)
    assert data.skipped == ("a/odd.png",) and len(data.train) + len(data.test) == 12
    assert "a/odd.png" in (text := capfd.readouterr().err) and kind in text
    with pytest.raises(DataError, match=kind):
        read_folder(folder, strict=True, **OPTIONS)


def test_a_picture_that_becomes_a_pipe_later_is_named(folder, monkeypatch):
    monkeypatch.setenv("PSPINAL_JAX_CACHE", "off")
    data = read_folder(folder, strict=False, **OPTIONS)
    for file in folder.rglob("*.png"):
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(DataError, match=r"\.png: .*a named pipe"):
        data.train.read(0, (8, 8))


@every_kind
def test_other_data_files_are_one_line(tmp_path, kind):
    if kind != "expected at most":
        NO_FILES[kind](tmp_path / "data.npz")
        NO_FILES[kind](tmp_path / "data.zip")
        with pytest.raises(DataError, match=kind):
            read_npz(tmp_path / "data.npz", None)
        with pytest.raises(DataError, match=kind), open_zip(tmp_path / "data.zip"):
            pass
    NO_FILES[kind](tmp_path / "small")
    with pytest.raises(OSError, match=kind):
        read_bytes(tmp_path / "small", 1000)
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path, 1000)


@pytest.fixture(scope="module")
def run(npz_path, tmp_path_factory):
    place = tmp_path_factory.mktemp("trust") / "run"
    more = {"epochs": 1, "batch_size": 16, "eval_batch_size": 50, "model__layer_width": 6}
    pspinal_jax.train("mnist", data__path=npz_path, data__num_validation=20, retrain=False, workdir=place, **more)
    assert main(["export", str(place), "--output", str(place.parent / "export")]) == 0
    return place


def run_files(place):
    """One file of each kind in a run and an export."""
    yield from ("run/config.json", "run/result.json", "export/export.json", "export/model.jaxexport")
    yield next(path for path in sorted((place / "run" / "checkpoints").rglob("*")) if path.is_file()).relative_to(place)


@pytest.mark.parametrize("number", range(5))
def test_in_runs_and_exports_they_are_one_line(run, tmp_path, number, capsys):
    place = tmp_path / "copy"
    shutil.copytree(run.parent, place)
    name = list(run_files(place))[number]
    (place / name).unlink()
    os.mkfifo(place / name)
    image = tmp_path / "x.png"
    Image.new("L", (4, 4)).save(image)
    source = place / str(name).split("/")[0]
    capsys.readouterr()
    assert main(["predict", str(source), str(image)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True] and str(place) in lines[0]


@every_kind
def test_predict_names_them(run, tmp_path, kind):
    NO_FILES[kind](tmp_path / "x.png")
    Image.new("L", (4, 4)).save(tmp_path / "y.png")
    odd, good = pspinal_jax.load_run(run).predict([tmp_path / "x.png", tmp_path / "y.png"])
    assert kind in odd.error and good.error is None


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    place = tmp_path_factory.mktemp("tfds")
    assert main(["prepare", "digits", "--data-dir", str(place)]) == 0
    return next(path.parent for path in place.rglob("features.json"))


@pytest.fixture
def stranger(digits, tmp_path, monkeypatch):
    """A copy of the prepared digits, and a module on the path whose import leaves a trace."""
    shutil.copytree(digits, tmp_path / "digits" / "1.0.0")
    (tmp_path / "stranger.py").write_text("raise SystemExit('code of the data set ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "digits" / "1.0.0"
    assert "stranger" not in sys.modules


CLASS = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(CLASS, "stranger.Label"),
        lambda text: text.replace("pythonClassName", "python_class_name").replace(CLASS, "stranger.Label"),
        lambda text: text.replace("tensorflow_datasets.core.features.features_dict.FeaturesDict", "stranger.Dict"),
        lambda text: text.replace(CLASS, "tensorflow_datasets.core.features.video_feature.Video"),
        lambda text: json.dumps({"type": "stranger.Label", "content": {}}),
        lambda text: json.dumps(
            {
                "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
                "json": {"json": json.dumps({"x": {"type": "stranger.Label", "content": ""}})},
            }
        ),
    ],
)
def test_no_module_that_a_data_set_names_is_imported(stranger, change):
    described = (stranger / "features.json").read_text()
    (stranger / "features.json").write_text(change(described))
    with pytest.raises(DataError, match=r"expected one of TFDS's own features"):
        read_prepared(stranger, None)


def test_the_module_of_the_builder_is_not_imported(stranger):
    info = json.loads((stranger / "dataset_info.json").read_text())
    (stranger / "dataset_info.json").write_text(json.dumps(info | {"moduleName": "stranger"}))
    assert read_prepared(stranger, None).num_classes == 10


def test_features_of_tfds_are_taken_unless_programs_decode_them():
    known = tfds.import_tfds().features.FeatureConnector._registered_features
    refused = {name.rpartition(".")[2] for name in known if not tfds._FEATURE.fullmatch(name)}
    assert refused == {"Audio", "Video"}


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "label.labels.txt", "digits-test"])
def test_pipes_in_a_prepared_data_set_are_one_line(stranger, name):
    path = next(path for path in stranger.iterdir() if path.name.startswith(name))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="a named pipe"):
        read_prepared(stranger, None)


def test_postscript_in_a_data_set_is_never_handed_on():
    """Pillow starts Ghostscript for it."""
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "EPS")
    assert buffer.getvalue().startswith(b"%!PS")
    with pytest.raises(OSError, match="cannot identify"):
        tfds._decode(buffer.getvalue())


def rewrite(path, change):
    """`change` the JSON file `path` of a run, and its checksum with it, as a stranger can."""
    held = json.loads(path.read_text())
    held.pop("checksum", None)
    change(held)
    path.write_text(json.dumps(held | {"checksum": json_checksum(held)}))


def setting(place, value):
    """A change of what lies at the dotted `place`."""

    def change(held):
        *folders, last = place.split(".")
        for each in folders:
            held = held[each]
        if value is KeyError:
            del held[last]
        else:
            held[last] = value

    return change


STRANGE_CONFIGS = [
    *((place, value) for place in ("identity", "device", "class_names") for value in (None, 7, "text", {})),
    *(("versions", value) for value in (None, 7, {"jax": 7})),
    *((f"identity.{part}", None) for part in ("card", "data", "model", "optimizer", "augment", "epochs", "dtype")),
    *((f"identity.{part}", {"unknown": 1}) for part in ("data", "model", "augment")),
    *(("identity.eval_batch_size", value) for value in (True, 10**30, 2.5, "8", -1)),
    *(("identity.data.mean", value) for value in ("text", [1, 2], [1, 2, "3"], 1e300, float("nan"))),
    *(("identity.model.num_layers", value) for value in (10**9, 10**300)),
    *(("identity.model.layer_width", value) for value in (10**15, 0)),
    *(("identity.num_seeds", value) for value in (2, 10**12)),
    *(("input_shape", value) for value in ([], [4, 4], [4, 4, 0], [10**6, 10**6, 1], [4, 4, "1"], "441", [4.0, 4, 1])),
    *(("data_location", value) for value in (["a"], {"path": 7}, {"path": "a\0b"}, {"folder": "a"})),
    *((place, KeyError) for place in ("identity", "identity.card.name", "num_seeds", "device.count", "data_source")),
    *(("class_names", value) for value in ([], ["a", {"a": 1}], [1, 2, 3])),
    ("identity.data.image_size", "own"),
    ("identity.data.image_size", 16),
    ("input_dtype", "text"),
    ("num_seeds", 2),
]


@pytest.mark.parametrize(("place", "value"), STRANGE_CONFIGS)
def test_config_of_a_stranger_with_its_checksum_right_is_one_line(run, tmp_path, place, value):
    shutil.copy(run / "config.json", tmp_path)
    rewrite(tmp_path / "config.json", setting(place, value))
    with pytest.raises(RunError, match=r"config.json is damaged: .* another workdir") as told:
        RunDirectory(tmp_path).config()
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((place, "text") for place in ("seconds", "parameters", "test_accuracy.each", "test_classes", "epochs")),
        *(("test_accuracy", value) for value in (None, [], {"mean": 1.0, "std": None})),
        *(("test_accuracy.each", value) for value in ([], [1.0, 1.0], [None])),
        *((place, KeyError) for place in ("seconds", "selection", "published_accuracy_percent")),
        ("test_classes", [{"name": "a"}]),
        ("selection", 3),
        ("compile_seconds", 10**400),
    ],
)
def test_result_of_a_stranger_with_its_checksum_right_is_one_line(run, tmp_path, place, value):
    for name in ("config.json", "result.json"):
        shutil.copy(run / name, tmp_path)
    rewrite(tmp_path / "result.json", setting(place, value))
    with pytest.raises(RunError, match=r"result.json is damaged: .*; train in another workdir"):
        RunDirectory(tmp_path).result()


def test_model_of_a_stranger_that_cannot_be_built_is_one_line(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    rewrite(tmp_path / "run" / "config.json", setting("identity.model.backbone", "vgg5"))
    with pytest.raises(RunError, match="describes no model: the backbone vgg5 takes images"):
        load_variables(tmp_path / "run")


def test_metrics_of_a_stranger_are_left_out(run, tmp_path):
    good = (run / "metrics.jsonl").read_text()
    strange = [
        {"stage": 1},
        {"stage": {}, "epoch": 1, "step": 1},
        {"stage": "train", "epoch": "1", "step": 1},
        {"stage": "train", "epoch": 1, "step": 1, "train_loss": "much"},
        {"stage": "train", "epoch": 10**30, "step": 1},
        {"stage": "train", "epoch": 1, "step": 1, "train_loss": [[1.0]]},
    ]
    of_no_number = {"stage": "train", "epoch": 1, "step": 1, "train_loss": None, "validation_loss": [None, 1.0]}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*strange, of_no_number])) + "\n" + good)
    assert RunDirectory(tmp_path).metrics() == [of_no_number, *RunDirectory(run).metrics()]


@every_kind
def test_metrics_that_are_no_file_are_one_line(tmp_path, kind):
    NO_FILES[kind](tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match=rf"metrics.jsonl cannot be read: .*({kind}|it has)"):
        RunDirectory(tmp_path).metrics()
