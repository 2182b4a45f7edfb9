"""Photographs read back from what prepare wrote."""

import dataclasses
import io
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from raw_images import birds_members, write_files

from pspinal_jax.data import tfds
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.data.dataset import digest_bytes
from pspinal_jax.data.images.decode import decode
from pspinal_jax.data.prepare import prepare_data_set
from pspinal_jax.data.stream import stream
from pspinal_jax.data.tfds import read_image_records
from pspinal_jax.errors import DataError


def prepare(folder, raw):
    birds = dataclasses.replace(CATALOGUE["birds225"], num_folders=2)
    return prepare_data_set(birds, folder / "data", raw=raw).directory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Birds, prepared."""
    folder = tmp_path_factory.mktemp("birds")
    raw = write_files(folder / "raw", birds_members())
    return prepare(folder, raw)


def test_records_are_read_without_tensorflow_and_labels_once(prepared, monkeypatch):
    first = read_image_records(prepared, 4)
    monkeypatch.setattr(tfds, "_read_labels", None)
    again = read_image_records(prepared, 4)
    assert again.fingerprint() == first.fingerprint() and again.class_names == first.class_names
    np.testing.assert_array_equal(again.validation.labels, [0, 0, 1, 1])
    encoded = again.train.encoded
    assert again.train.digests.tolist() == [digest_bytes(encoded[index]) for index in range(len(encoded))]
    assert again.train.encoded.name(3) == f"train[3] of {prepared}"
    with Image.open(io.BytesIO(again.train.encoded[0])) as image:
        assert image.format == "JPEG"
    assert "tensorflow" not in sys.modules


def test_records_travel_to_worker_processes(prepared):
    encoded = read_image_records(prepared, 4).train.encoded
    first = encoded[0]
    copy = pickle.loads(pickle.dumps(encoded))
    assert copy[0] == first and len(copy) == len(encoded) and copy.fingerprint() == encoded.fingerprint()


def test_records_are_streamed(prepared):
    photos = read_image_records(prepared, 4).train
    order = np.tile([7, 0, 4, 4], 10)
    images, labels = map(np.concatenate, zip(*stream(photos, [order[:8], order[8:]], (3, 3)), strict=True))
    np.testing.assert_array_equal(labels, photos.labels[order])
    np.testing.assert_array_equal(images, [decode(photos.encoded[index], (3, 3)) for index in order])


def test_other_records_have_another_fingerprint(prepared, tmp_path):
    members = birds_members()
    one, two = "train/ALBATROSS/1.jpg", "train/ALBATROSS/2.jpg"
    raw = write_files(tmp_path / "raw", members | {one: members[two], two: members[one]})
    assert read_image_records(prepare(tmp_path, raw), 4).fingerprint() != read_image_records(prepared, 4).fingerprint()


def test_damaged_or_missing_records_are_a_data_error(prepared, tmp_path):
    with pytest.raises(DataError, match="is not a data set that TFDS can read"):
        read_image_records(tmp_path / "nothing", 4)
    copy = tmp_path / "birds225" / "1.0.0"
    shutil.copytree(prepared, copy)
    (record,) = copy.glob("*train*")
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(
        DataError, match=r"birds225/1\.0\.0 cannot be read: .*; delete the data set and prepare"
    ) as caught:
        read_image_records(copy, 4)
    assert "\n" not in str(caught.value)
    record.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_image_records(copy, 4)
