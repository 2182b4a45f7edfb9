import pickle

import numpy as np
import pytest

from pspinal_jax.data.npz import read_npz
from pspinal_jax.errors import DataError


def write(path, arrays, **changes):
    merged = {**arrays, **changes}
    np.savez(path, **{name: array for name, array in merged.items() if array is not None})
    return path


def test_images_get_a_channel_axis_and_labels_become_int32(npz_path, arrays):
    data = read_npz(npz_path, None)
    assert data.train.inputs.shape == (96, 4, 4, 1) and data.train.inputs.dtype == np.uint8
    np.testing.assert_array_equal(data.train.inputs[..., 0], arrays["train_images"])
    assert data.test.labels.dtype == np.int32
    assert data.class_names == ("0", "1", "2")


def test_float_features_and_class_names_are_read(tmp_path, arrays):
    features = {f"{part}_images": arrays[f"{part}_images"].reshape(-1, 16) / 9.0 for part in ("train", "test")}
    names = np.array(["sheep", "goat", "cow"])
    data = read_npz(write(tmp_path / "f.npz", arrays, class_names=names, **features), None)
    assert data.train.inputs.dtype == np.float32 and data.train.inputs.shape == (96, 16)
    assert data.class_names == ("sheep", "goat", "cow")


def test_fingerprint_depends_on_every_array(tmp_path, arrays):
    first = read_npz(write(tmp_path / "a.npz", arrays), None).fingerprint()
    assert first == read_npz(write(tmp_path / "b.npz", arrays), None).fingerprint()
    for name in arrays:
        changed = arrays[name].copy()
        changed.flat[0] = (changed.flat[0] + 1) % 3
        assert read_npz(write(tmp_path / "c.npz", arrays, **{name: changed}), None).fingerprint() != first


NAN = np.full((96, 5), 1.0)
NAN[7, 3] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, r"lacks test_labels; it has: train_images"),
        ({"train_labels": np.arange(95) % 3}, r"96 examples but 95 labels"),
        ({"train_labels": np.full(96, 3)}, r"train_labels go from 3 to 3, expected 0 .. 2"),
        ({"test_labels": np.full(50, -1)}, r"test_labels go from -1"),
        ({"train_labels": np.full(96, 0.5)}, r"train_labels hold 0.5, expected integers"),
        (
            {"train_images": NAN, "test_images": NAN[:50]},
            r"column '3' .* lacks 1 of 480 values .*, the first in row 7",
        ),
        ({"train_images": np.zeros((96, 4, 5), np.uint8)}, r"expected those of train"),
        ({"train_images": np.zeros((96, 4, 4), np.int64)}, r"expected uint8 images"),
        ({"test_images": np.zeros((0, 4, 4), np.uint8), "test_labels": np.zeros(0, int)}, r"is empty"),
        ({"class_names": np.array(["a", "b"])}, r"2 class names for 3 classes"),
    ],
)
def test_bad_arrays_get_one_clear_line(tmp_path, arrays, changes, message):
    path = write(tmp_path / "bad.npz", arrays, **changes)
    with pytest.raises(DataError, match=message) as caught:
        read_npz(path, 3)
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04cut"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.npz cannot be read"):
        read_npz(path, None)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.npz cannot be read.*No such file"):
        read_npz(tmp_path / "none.npz", None)


def test_a_truncated_file_is_named(tmp_path, npz_path):
    whole = npz_path.read_bytes()
    path = tmp_path / "cut.npz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        read_npz(path, None)


def test_pickles_are_not_loaded(tmp_path, arrays):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = tmp_path / "evil.npz"
    np.savez(path, **{**arrays, "train_images": np.array([Evil()] * 96, object)}, allow_pickle=True)
    assert pickle.loads is not None
    with pytest.raises(DataError, match="cannot be read"):
        read_npz(path, None)
    assert not marker.exists()
