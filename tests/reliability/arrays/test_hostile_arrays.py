"""Arrays from strangers: sizes and ranges are checked before memory is taken, and what cannot be used is one line."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from pspinal_jax.__main__ import main
from pspinal_jax.data.images.decode import decode
from pspinal_jax.data.npz import read_npz
from pspinal_jax.errors import DataError


def features(**changes):
    """Six features of 60 examples, 3 classes."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    made = {f"{split}_images": rng.normal(size=(60, 6)).astype(np.float32) for split in ("train", "test")}
    return made | {"train_labels": labels, "test_labels": labels} | changes


def saved(path, **changes):
    np.savez(path, **features(**changes))
    return path


def refused(path):
    with pytest.raises(DataError) as caught:
        read_npz(path, None)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


LARGE, WIDE = np.arange(60) % 3, np.zeros((60, 6))
LARGE[0], WIDE[0, 0] = 2**31 - 2, 1e39


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": LARGE}, "train_labels go up to 2147483646, with 60 examples"),
        ({"train_labels": np.arange(60) + 2**32}, "labels go from 0 to 4294967355, expected 0 .. C-1"),
        ({"train_labels": np.full(60, 2**64 - 1, np.uint64)}, "expected 0 .. C-1"),
        ({"test_labels": np.arange(60) % 3 - 2**32}, "labels go from -4294967296"),
        ({"train_images": WIDE}, "beyond float32's range), the first in row 0"),
        (
            {f"{split}_images": np.zeros((60, 0), np.float32) for split in ("train", "test")},
            "is empty",
        ),
        (
            {f"{split}_images": np.zeros((60, 4, 4, 0), np.uint8) for split in ("train", "test")},
            "is empty",
        ),
        (
            {f"{split}_images": np.zeros((60, 8, 0), np.uint8) for split in ("train", "test")},
            "is empty",
        ),
        ({"class_names": np.array(["cat", "cat", "dog"])}, "class_names hold a name twice: cat"),
        ({"class_names": np.array([b"cat", b"\xff", b"dog"])}, "not UTF-8"),
        ({"class_names": np.array([0.5, 1.5, 2.5])}, "dtype float64, expected text"),
        ({"class_names": np.array([["a"], ["b"], ["c"]])}, "shape (3, 1) and dtype <U1, expected text [C]"),
        ({"validation_images": np.zeros((4, 6), np.float32)}, "lacks validation_labels"),
        ({"train_labels": np.array([None] * 60)}, "Object arrays cannot be loaded"),
    ],
)
def test_what_means_nothing_sensible_is_refused(tmp_path, changes, message):
    assert message in refused(saved(tmp_path / "data.npz", **changes))


def test_names_as_bytes_are_text(tmp_path):
    assert read_npz(
        saved(tmp_path / "a.npz", class_names=np.array([b"cat", b"dog", "kü".encode()])), None
    ).class_names == (
        "cat",
        "dog",
        "kü",
    )


def test_arrays_that_are_not_used_are_named(tmp_path, capfd):
    data = read_npz(saved(tmp_path / "d.npz", val_images=np.zeros(3), val_labels=np.zeros(3, int)), None)
    assert "not used: val_images, val_labels" in data.passed_over[0]
    assert data.passed_over[0] in capfd.readouterr().err


def header(shape, version=1):
    buffer = io.BytesIO()
    write = np.lib.format.write_array_header_1_0 if version == 1 else np.lib.format.write_array_header_2_0
    write(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def with_member(path, content, **options):
    """An .npz whose train_images are these bytes."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("train_images.npy", content)
        for name, array in features().items():
            if name != "train_images":
                buffer = io.BytesIO()
                np.save(buffer, array)
                archive.writestr(f"{name}.npy", buffer.getvalue())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header((10**15, 6)), "Unable to allocate"),
        (header((10**15, 6), 2), "Unable to allocate"),
        (header((10, 6)) + bytes(239), "EOF"),
        (header((-2, -3)) + bytes(24), "can only specify one unknown dimension"),
        (b"\x93NUMPY\x03\x00" + bytes(100), "header"),
        (b"", "inputs have shape ()"),
        (b"no array at all", "inputs have shape ()"),
    ],
)
def test_headers_that_do_not_fit_their_content_are_refused(tmp_path, content, message):
    assert message in refused(with_member(tmp_path / "h.npz", content))


def test_arrays_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 3}.__getitem__)
    assert "bytes, and this machine has 3000" in refused(saved(tmp_path / "m.npz"))


def test_archives_that_cannot_be_unpacked_are_one_line(tmp_path):
    (tmp_path / "single.npy").write_bytes(b"")
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "renamed.npz")
    assert "not a zip file" in refused(tmp_path / "renamed.npz")
    whole = saved(tmp_path / "whole.npz").read_bytes()
    encrypted, odd = bytearray(whole), bytearray(whole)
    for at in [at for at in range(len(whole)) if whole.startswith(b"PK\x01\x02", at)]:
        encrypted[at + 8] |= 1
        struct.pack_into("<H", odd, at + 10, 77)
    for at in [at for at in range(len(whole)) if whole.startswith(b"PK\x03\x04", at)]:
        encrypted[at + 6] |= 1
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for name, content, message in (
        ("encrypted", encrypted, "encrypted"),
        ("odd", odd, "compression"),
        ("flipped", flipped, ""),
        ("half", whole[: len(whole) // 2], "zip"),
    ):
        (tmp_path / f"{name}.npz").write_bytes(content)
        assert message in refused(tmp_path / f"{name}.npz")


def chunks(png):
    """(start, length) of each chunk's data."""
    start = 8
    while start < len(png):
        length = int.from_bytes(png[start : start + 4])
        yield start + 8, length
        start += 12 + length


def test_every_bit_of_a_png_counts():
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    sound = buffer.getvalue()
    np.testing.assert_array_equal(decode(sound, (24, 24)), pixels)
    np.testing.assert_array_equal(decode(sound + b"what follows the end", (24, 24)), pixels)
    rng = np.random.default_rng(1)
    for start, length in chunks(sound):
        if not length:
            continue  # the end, which holds nothing
        for at in [start - 4, *(start + rng.integers(0, length, min(length, 40))), start + length]:
            damaged = bytearray(sound)
            damaged[at] ^= 1 << int(rng.integers(8))
            with pytest.raises(DataError, match="cannot be decoded"):
                decode(bytes(damaged), (24, 24))
    for end in range(9, len(sound) - 12, 7):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode(sound[:end], (24, 24))


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (
            ["--batch-size", "1", "--model.norm", "batch"],
            2,
            "--batch-size is 1, expected 2 or more a micro-batch for batch norm",
        ),
        (
            ["--batch-size", "4", "--micro-batches", "4", "--model.norm", "batch"],
            2,
            "--batch-size is 4, expected 2 or more",
        ),
        (["--data.mean", "0.5", "0.5", "0.5", "--data.std", "0.2", "0.2", "0.2"], 2, "--data.mean is"),
        (["--data.path", "~nosuchuser/d.npz"], 2, "no home directory is known"),
    ],
)
def test_settings_that_fit_no_data_are_refused(tmp_path, capsys, flags, status, message):
    images = {f"{split}_images": np.zeros((60, 4, 4), np.uint8) for split in ("train", "test")}
    path = saved(tmp_path / "i.npz", **images)
    held_out = ["--data.num-validation", "6", "--workdir", str(tmp_path / "run")]
    assert main(["train", "mnist", "--data.path", str(path), *held_out, *flags]) == status
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_no_memory_is_one_line(monkeypatch, capsys):
    def fill(name):
        raise MemoryError("Unable to allocate 3 TiB")

    monkeypatch.setattr("pspinal_jax.__main__.import_module", fill)
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err == "error: out of memory: Unable to allocate 3 TiB\n"
