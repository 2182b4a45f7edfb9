"""Whatever is wrong with the raw files: one clear line, and no data set."""

import dataclasses
import gzip
import hashlib
import zipfile

import numpy as np
import pytest
from raw_files import MNIST_NAMES, QMNIST_NAMES, emnist_names, examples, idx, write_raw

from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.data.prepare import prepare_data_set
from pspinal_jax.errors import DataError, PSpinalError, UsageError

IMAGES = np.ones((40, 28, 28), np.uint8)


def assert_refused(name, tmp_path, *fragments, kind=DataError, **source):
    with pytest.raises(kind) as caught:
        prepare_data_set(CATALOGUE[name], tmp_path / "data", **source)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message
    assert not (tmp_path / "data").exists(), "nothing may be written"


def packed(array):
    return gzip.compress(idx(array), 1)


CUT = packed(IMAGES)[:-20]
BAD_MNIST = [
    pytest.param(MNIST_NAMES[0], CUT, "cannot be read: Compressed file ended", id="truncated gzip"),
    pytest.param(MNIST_NAMES[0], gzip.compress(b"\0\0\x08\x02" + idx(IMAGES)[4:]), "00 00 08 02", id="magic number"),
    pytest.param(MNIST_NAMES[0], packed(IMAGES[:39]), "39 images but", id="counts differ"),
    pytest.param(MNIST_NAMES[0], packed(IMAGES[:, :, :27]), "items of shape (28, 27)", id="shape"),
    pytest.param(
        MNIST_NAMES[0],
        gzip.compress(idx(IMAGES) + b"x"),
        "(31360 bytes) and has 31361",
        id="trailing data",
    ),
    pytest.param(MNIST_NAMES[1], packed(np.full(40, 10, np.uint8)), "from 10 to 10, expected 0 .. 9", id="label"),
    pytest.param(MNIST_NAMES[1], packed(np.zeros(40, np.int32)), "00 00 0c 01, expected 00 00 08 01", id="int labels"),
    pytest.param(MNIST_NAMES[3], None, f"lacks {MNIST_NAMES[3]}; mnist takes a folder with train-images", id="missing"),
]


@pytest.mark.parametrize(("file", "content", "message"), BAD_MNIST)
def test_bad_mnist_files(tmp_path, file, content, message):
    raw = write_raw(tmp_path / "raw", "mnist", examples(10))
    if content is None:
        (raw / file).unlink()
    else:
        (raw / file).write_bytes(content)
    assert_refused("mnist", tmp_path, str(raw), file, message, raw=raw)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((40, 8), -1, np.int32), "from -1 to -1, expected 0 .. 9"),
        (np.full((40, 8), 70_000, np.int32), "from 70000 to 70000"),
        (np.zeros((40, 7), np.int32), "items of shape (7,)"),
    ],
)
def test_bad_qmnist_labels(tmp_path, labels, message):
    raw = write_raw(tmp_path / "raw", "qmnist", examples(10))
    (raw / QMNIST_NAMES[1]).write_bytes(packed(labels))
    assert_refused("qmnist", tmp_path, QMNIST_NAMES[1], message, raw=raw)


def rewrite_zip(path, changes):
    """Write the zip at `path` again with entries changed, added, or (None) left out."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**entries, **changes}.items():
            if data is not None:
                archive.writestr(name, data)


TRAIN_IMAGES, TRAIN_LABELS = (f"gzip/{name}" for name in emnist_names("letters")[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({TRAIN_IMAGES: None}, f"lacks {emnist_names('letters')[0]}", id="entry missing"),
        pytest.param({TRAIN_IMAGES: CUT}, f"{emnist_names('letters')[0]} cannot be read", id="entry cut short"),
        pytest.param({TRAIN_LABELS: packed(np.zeros(40, np.uint8))}, "from 0 to 0, expected 1 .. 26", id="label 0"),
        pytest.param({TRAIN_LABELS: packed(np.full(40, 27, np.uint8))}, "from 27 to 27", id="label 27"),
        pytest.param({TRAIN_LABELS: packed(np.ones(39, np.uint8))}, "40 images but", id="counts differ"),
    ],
)
def test_bad_emnist_zips(tmp_path, changes, message):
    raw = write_raw(tmp_path / "raw", "emnist_letters", examples(26))
    rewrite_zip(raw / "gzip.zip", changes)
    assert_refused("emnist_letters", tmp_path, "gzip.zip", message, raw=raw)
    assert len(list(tmp_path.rglob("*"))) == 2


def test_paths_that_point_outside_an_archive_are_never_written(tmp_path):
    raw = write_raw(tmp_path / "raw", "emnist_letters", examples(26))
    evil = {"../evil.txt", "gzip/../../evil.txt", f"{tmp_path}/evil.txt", "..\\evil.txt", "C:\\evil.txt"}
    rewrite_zip(raw / "gzip.zip", dict.fromkeys(evil, b"x"))
    prepare_data_set(CATALOGUE["emnist_letters"], tmp_path / "data", raw=raw)
    assert not list(tmp_path.rglob("*evil*"))


def test_damaged_zips(tmp_path):
    raw = write_raw(tmp_path / "raw", "emnist_letters", examples(26))
    whole = (raw / "gzip.zip").read_bytes()
    (raw / "gzip.zip").write_bytes(whole[: len(whole) // 2])
    assert_refused("emnist_letters", tmp_path, "gzip.zip cannot be read as a zip file", raw=raw)
    # Past the gzip stream's own header, and before the end: zip's checksum of the entry is what notices.
    at = whole.index(b"\x1f\x8b") + 500
    (raw / "gzip.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert_refused("emnist_letters", tmp_path, "cannot be read: Bad CRC-32", raw=raw)


def test_the_files_of_a_set_with_the_same_names_are_refused(tmp_path, monkeypatch):
    raw = write_raw(tmp_path / "raw", "kmnist", examples(10))
    content = (raw / MNIST_NAMES[1]).read_bytes()
    known = dataclasses.replace(CATALOGUE["kmnist"].downloads[1], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(CATALOGUE, "kmnist", dataclasses.replace(CATALOGUE["kmnist"], downloads=(known,)))
    assert_refused("mnist", tmp_path, f"{MNIST_NAMES[1]} is the file of kmnist, expected that of mnist", raw=raw)


def test_wrong_sources(tmp_path):
    assert_refused("mnist", tmp_path, "none does not exist", raw=tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert_refused("mnist", tmp_path, "file cannot be read as a zip file", raw=tmp_path / "file")
    assert_refused("mnist", tmp_path, "none.npz cannot be read", npz=tmp_path / "none.npz")
    assert_refused("mnist", tmp_path, "not both", kind=UsageError, raw=tmp_path, npz=tmp_path)
    assert_refused("digits", tmp_path, "comes with scikit-learn", kind=UsageError, raw=tmp_path)
    (tmp_path / "raw").mkdir()
    assert_refused("emnist_digits", tmp_path, "takes a folder with gzip.zip, or with", raw=tmp_path / "raw")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.full(40, 10)}, "from 10 to 10, expected 0 .. 9"),
        ({"train_labels": np.zeros(39, int)}, "40 examples but 39 labels"),
        ({"train_images": IMAGES[:, :20, :20], "test_images": IMAGES[:, :20, :20]}, "shape (20, 20, 1), expected"),
    ],
)
def test_bad_npz_files(tmp_path, changes, message):
    arrays = {"train_images": IMAGES, "test_images": IMAGES, "train_labels": np.zeros(40, int)}
    np.savez(tmp_path / "a.npz", **{**arrays, "test_labels": np.zeros(40, int), **changes})
    assert_refused("mnist", tmp_path, "a.npz", message, npz=tmp_path / "a.npz")


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    from PIL import Image

    raw = write_raw(tmp_path / "raw", "mnist", examples(10))
    real, calls = Image.fromarray, []

    def full_disk(array):
        calls.append(array)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return real(array)

    monkeypatch.setattr(Image, "fromarray", full_disk)
    with pytest.raises(DataError, match=r"mnist cannot be prepared in .*No space left on device") as caught:
        prepare_data_set(CATALOGUE["mnist"], tmp_path / "data", raw=raw)
    assert len(calls) == 21 and "\n" not in str(caught.value)
    assert not (tmp_path / "data" / "mnist").exists()


def test_a_folder_that_is_in_the_way_is_named(tmp_path):
    raw = write_raw(tmp_path / "raw", "mnist", examples(10))
    (tmp_path / "data" / "mnist" / "1.0.0").mkdir(parents=True)
    with pytest.raises(DataError, match=r"mnist/1\.0\.0 exists but is not a complete data set; delete it"):
        prepare_data_set(CATALOGUE["mnist"], tmp_path / "data", raw=raw)
    with pytest.raises(PSpinalError, match=r"data folder .*raw/.* cannot be written"):
        prepare_data_set(CATALOGUE["mnist"], raw / MNIST_NAMES[0], raw=raw)
