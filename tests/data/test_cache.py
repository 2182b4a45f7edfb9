"""The arrays kept beside a prepared directory: used when they fit, never trusted when they do not."""

import os
import pathlib

import numpy as np
import pytest
from raw_files import examples, write_raw

from pspinal_jax.data import load_data, tfds
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.data.prepare import prepare_data_set
from pspinal_jax.recipes import DataConfig


@pytest.fixture
def data_dir(tmp_path):
    raw = write_raw(tmp_path / "raw", "mnist", examples(10))
    prepare_data_set(CATALOGUE["mnist"], tmp_path / "data", raw=raw)
    return tmp_path / "data"


@pytest.fixture
def reads(monkeypatch):
    """The splits whose records were decoded."""
    real, names = tfds._open_split, []
    monkeypatch.setattr(tfds, "_open_split", lambda builder, name: names.append(name) or real(builder, name))
    return names


def load(data_dir):
    return load_data(DataConfig("mnist", data_dir=data_dir))


def cache_file(data_dir):
    return data_dir / "mnist" / ".1.0.0.arrays.npz"


def test_records_are_decoded_once(data_dir, reads):
    first = load(data_dir)
    assert reads == ["train", "test"] and cache_file(data_dir).is_file()
    again = load(data_dir)
    assert reads == ["train", "test"] and again.fingerprint() == first.fingerprint()
    assert again.class_names == first.class_names and again.source == first.source
    assert not list(data_dir.rglob("*.part"))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "lacks an array", "a directory"])
def test_a_damaged_cache_is_ignored_and_written_again(data_dir, reads, damage):
    whole = load(data_dir).fingerprint()
    path = cache_file(data_dir)
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "empty": b"",
        "cut": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "text": b"not a zip",
    }
    if damage == "a directory":
        path.unlink()
        path.mkdir()
    elif damage == "lacks an array":
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files if name != "test_labels"}
        np.savez(path, **arrays)
    else:
        path.write_bytes(damaged[damage])
    reads.clear()
    assert load(data_dir).fingerprint() == whole and reads == ["train", "test"]
    assert load(data_dir).fingerprint() == whole
    assert reads == ["train", "test"] or damage == "a directory"


def test_other_records_of_the_same_size_are_noticed(data_dir, tmp_path, reads):
    load(data_dir)
    before = {path.name: path.stat().st_size for path in (data_dir / "mnist" / "1.0.0").iterdir()}
    made = examples(10)
    images, labels = made["train"]
    made["train"] = (images, (labels + 1) % 10)
    raw = write_raw(tmp_path / "other", "mnist", made)
    other = prepare_data_set(CATALOGUE["mnist"], tmp_path / "other_data", raw=raw).directory
    for path in other.iterdir():
        (data_dir / "mnist" / "1.0.0" / path.name).write_bytes(path.read_bytes())
    after = {path.name: path.stat().st_size for path in (data_dir / "mnist" / "1.0.0").iterdir()}
    records = [name for name in before if "array_record" in name]
    assert [before[name] for name in records] == [after[name] for name in records]
    np.testing.assert_array_equal(load(data_dir).train.labels, (labels + 1) % 10)


@pytest.mark.parametrize("refused", ["open", "replace"])
def test_a_folder_that_cannot_be_written_is_no_error(data_dir, reads, monkeypatch, refused):
    place, name = {"open": (pathlib.Path, "open"), "replace": (os, "replace")}[refused]
    real = getattr(place, name)

    def read_only(path, *args, **options):  # root may write anywhere, so the file system cannot be asked to refuse
        if str(path).endswith(".part"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    monkeypatch.setattr(place, name, read_only)
    load(data_dir)
    load(data_dir)
    assert reads == ["train", "test"] * 2
    assert not cache_file(data_dir).exists() and not list(data_dir.rglob("*.part"))
