"""STL-10, Caltech-101, Fruits-360 and Birds, from tiny files in the format they are published in, through prepare."""

import dataclasses
import functools

import numpy as np
import pytest
from raw_images import (
    CALTECH_CLASSES,
    birds_members,
    caltech_members,
    caltech_zip,
    fruits_members,
    jpeg,
    stl10_arrays,
    stl10_files,
    tar_gz,
    write_files,
    write_zip,
)

from pspinal_jax.__main__ import main
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.data.images.decode import decode
from pspinal_jax.data.prepare import prepare_data_set
from pspinal_jax.data.tfds import read_image_records
from pspinal_jax.errors import DataError, UsageError


def small(name, num_folders):
    """The entry of `name`, with as many classes as our files have."""
    return dataclasses.replace(CATALOGUE[name], num_folders=num_folders)


CALTECH, FRUITS, BIRDS = small("caltech101", 3), small("fruits360", 3), small("birds225", 2)


def pictures(photos):
    """(encoded picture, label) of every photo, sorted."""
    return sorted((photos.encoded[index], int(label)) for index, label in enumerate(photos.labels))


def expected(members, folder, names):
    """(encoded picture, label) of every member in the class folders of `folder`, sorted."""
    return sorted(
        (content, label)
        for label, name in enumerate(names)
        for path, content in members.items()
        if f"{folder}/{name}/" in path
    )


def prepare(data_set, tmp_path, raw):
    return read_image_records(prepare_data_set(data_set, tmp_path / "data", raw=raw).directory, 4)


STL10_PLACES = {
    "archive": lambda raw, files: write_files(
        raw, {"stl10_binary.tar.gz": tar_gz({f"stl10_binary/{name}": content for name, content in files.items()})}
    ),
    "archive itself": lambda raw, files: STL10_PLACES["archive"](raw, files) / "stl10_binary.tar.gz",
    "unpacked": lambda raw, files: write_files(raw / "stl10_binary", files).parent,
    "inside": write_files,
}


@pytest.mark.parametrize("place", STL10_PLACES)
def test_stl10_comes_out_upright_in_order_with_class_names(tmp_path, place):
    arrays = stl10_arrays()
    raw = STL10_PLACES[place](tmp_path / "raw", stl10_files(arrays))
    data = prepare(CATALOGUE["stl10"], tmp_path, raw)
    assert data.class_names == CATALOGUE["stl10"].class_names and data.class_names[9] == "truck"
    assert data.validation is None
    for split, (images, labels) in arrays.items():
        photos = getattr(data, split)
        np.testing.assert_array_equal(photos.labels, labels)
        for index, image in enumerate(images):
            np.testing.assert_array_equal(decode(photos.encoded[index], (96, 96)), image)
        assert photos.encoded[0].startswith(b"\x89PNG")


CALTECH_PLACES = {
    "archive": lambda raw, members: write_zip(raw / "caltech-101.zip", caltech_zip(members)).parent,
    "archive itself": lambda raw, members: write_zip(raw / "another name.zip", caltech_zip(members)),
    "inner archive": lambda raw, members: write_files(raw, {"101_ObjectCategories.tar.gz": tar_gz(members)}),
    "half unpacked": lambda raw, members: write_files(
        raw, {"caltech-101/101_ObjectCategories.tar.gz": tar_gz(members)}
    ),
    "unpacked": write_files,
    "the folder of classes": lambda raw, members: write_files(raw, members) / "101_ObjectCategories",
}


@pytest.mark.parametrize("place", CALTECH_PLACES)
def test_caltech101_trains_on_30_of_each_class_always_the_same(tmp_path, place):
    members = caltech_members()
    data = prepare(CALTECH, tmp_path, CALTECH_PLACES[place](tmp_path / "raw", members))
    assert data.class_names == CALTECH_CLASSES and data.validation is None
    assert np.bincount(data.train.labels).tolist() == [30, 30, 30]
    assert np.bincount(data.test.labels).tolist() == [3, 1, 5]
    everything = sorted(pictures(data.train) + pictures(data.test))
    assert everything == expected(members, "101_ObjectCategories", CALTECH_CLASSES)
    # A draw, not the first thirty, and the same wherever the pictures come from.
    held_out = sorted(int(decode(data.test.encoded[i], (1, 1))[0, 0, 0]) for i in range(3))
    assert held_out == caltech_held_out(), held_out


@functools.cache
def caltech_held_out():
    """What the test pictures of class 0 show; picture i of class 0 shows i."""
    return sorted(np.random.default_rng([0, 0]).permutation(33)[30:].tolist())


ZIP_PLACES = {
    "zip": lambda raw, members: write_zip(raw / "archive.zip", members).parent,
    "zip itself": lambda raw, members: write_zip(raw / "archive.zip", members),
    "unpacked": write_files,
    "unpacked further down": lambda raw, members: write_files(raw / "a" / "b", members).parents[1],
}


@pytest.mark.parametrize("place", ZIP_PLACES)
def test_fruits360_and_birds_keep_their_splits_and_bytes(tmp_path, place):
    fruits, birds = fruits_members(), birds_members()
    data = prepare(FRUITS, tmp_path, ZIP_PLACES[place](tmp_path / "fruits", fruits))
    assert data.class_names == ("Apple Braeburn", "Cherry 1", "Kiwi") and data.validation is None
    assert pictures(data.train) == expected(fruits, "Training", data.class_names)
    assert pictures(data.test) == expected(fruits, "Test", data.class_names)

    data = prepare(BIRDS, tmp_path, ZIP_PLACES[place](tmp_path / "birds", birds))
    assert data.class_names == ("AFRICAN CROWNED CRANE", "ALBATROSS")
    for split, folder in (("train", "train"), ("validation", "valid"), ("test", "test")):
        assert pictures(getattr(data, split)) == expected(birds, folder, data.class_names)


def test_what_cannot_be_decoded_is_named_left_out_and_counted(tmp_path, capsys):
    members = caltech_members((33, 33, 35))
    for number in (1, 7):
        members[f"101_ObjectCategories/Faces_easy/image_{number:04d}.jpg"] = jpeg(1)[:200]
    data = prepare(CALTECH, tmp_path, CALTECH_PLACES["archive"](tmp_path / "raw", members))
    assert np.bincount(data.train.labels).tolist() == [30, 30, 30] and len(data.test) == 3 + 1 + 5
    assert capsys.readouterr().err == (
        "warning: caltech101: 2 images cannot be decoded: 101_ObjectCategories/Faces_easy/image_0001.jpg, "
        "101_ObjectCategories/Faces_easy/image_0007.jpg; left out\n"
    )


def stl10_with(**changes):
    def write(raw):
        return write_files(raw, stl10_files(stl10_arrays()) | changes)

    return write


def stl10_cut(raw):
    path = STL10_PLACES["archive itself"](raw, stl10_files(stl10_arrays()))
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def stl10_bad_checksum(raw):
    path = STL10_PLACES["archive itself"](raw, stl10_files(stl10_arrays()))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # gzip's checksum of what it holds
    path.write_bytes(content)
    return path


def zip_of(members, **changes):
    return lambda raw: write_zip(raw / "a.zip", members | changes)


def tar_of(members, **changes):
    return lambda raw: write_files(raw, {"101_ObjectCategories.tar.gz": tar_gz(members | changes)})


def without(members, fragment):
    return {path: content for path, content in members.items() if fragment not in path}


def two_zips(raw):
    write_zip(raw / "a.zip", fruits_members())
    return write_zip(raw / "b.zip", fruits_members()).parent


REFUSED = {
    "stl10: no files": ("stl10", lambda raw: raw, "raw does not exist; stl10 takes a folder with stl10_binary.tar.gz"),
    "stl10: cut images": (
        "stl10",
        stl10_with(**{"test_X.bin": b"123"}),
        "test_X.bin has 3 bytes, expected a mul",
    ),
    "stl10: counts": (
        "stl10",
        stl10_with(**{"train_y.bin": b"\1\2"}),
        "12 images but .*train_y.bin 2",
    ),
    "stl10: label 0": ("stl10", stl10_with(**{"train_y.bin": bytes(12)}), "labels from 0 to 0, expected 1 .. 10"),
    "stl10: cut archive": ("stl10", stl10_cut, r"stl10_binary.tar.gz cannot be read: .*; get the file again"),
    "stl10: checksum": ("stl10", stl10_bad_checksum, r"stl10_binary.tar.gz cannot be read: CRC check failed"),
    "stl10: lacking": (
        "stl10",
        lambda raw: write_files(raw, {"stl10_binary.tar.gz": tar_gz({"stl10_binary/train_X.bin": b""})}),
        "lacks train_y.bin",
    ),
    "caltech101: too few": (
        "caltech101",
        tar_of(caltech_members((33, 30, 33))),
        "30 images of Faces_easy that can be",
    ),
    "caltech101: classes": (
        "caltech101",
        tar_of(without(caltech_members(), "easy")),
        "holds 2 classes, but caltech101",
    ),
    "caltech101: nothing": ("caltech101", tar_of({}), "no folder holds all of caltech101"),
    "caltech101: no zip": (
        "caltech101",
        lambda raw: write_files(raw, {"caltech-101.zip": b"no zip"}),
        "caltech-101.zip cannot be read as a zip file",
    ),
    "fruits360: no test": (
        "fruits360",
        zip_of(without(fruits_members(), "/Test/")),
        "no folder holds all of fruits360",
    ),
    "fruits360: a class": (
        "fruits360",
        zip_of(without(fruits_members(), "Test/Kiwi")),
        "a.zip: Test lacks classes that another split has: Kiwi",
    ),
    "fruits360: twice": (
        "fruits360",
        zip_of(fruits_members() | {f"copy/{path}": content for path, content in fruits_members().items()}),
        "fruits-360, copy/fruits-360 holds all of fruits360, expected one",
    ),
    "fruits360: two zips": ("fruits360", two_zips, "holds a.zip, b.zip; give --raw the one to read"),
    "fruits360: unreadable": (
        "fruits360",
        zip_of(fruits_members(), **{"fruits-360/Test/Kiwi/r_7_100.jpg": b"x"}),
        "a.zip: Test/Kiwi holds no image that can be decoded",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_gets_one_line_and_nothing_is_written(tmp_path, case):
    name, write, message = REFUSED[case]
    data_set = {"stl10": CATALOGUE["stl10"], "caltech101": CALTECH, "fruits360": FRUITS}[name]
    with pytest.raises(DataError, match=message) as caught:
        prepare_data_set(data_set, tmp_path / "data", raw=write(tmp_path / "raw"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists() and not list(tmp_path.rglob("evil*"))


def test_what_cannot_be_downloaded_says_where_it_comes_from(tmp_path):
    for name, place in (("fruits360", "moltean/fruits"), ("birds225", "gpiosenka/100-bird-species")):
        with pytest.raises(
            DataError, match=rf"{name} cannot be downloaded.*{place}.* run: .* prepare {name} --raw DIR"
        ):
            prepare_data_set(CATALOGUE[name], tmp_path / "data")
        with pytest.raises(UsageError, match="takes --raw, not --npz"):
            prepare_data_set(CATALOGUE[name], tmp_path / "data", npz=tmp_path / "a.npz")
    assert not (tmp_path / "data").exists()


def test_addresses_checksums_and_sizes_are_those_of_tfds():
    import tensorflow_datasets as tfds

    for name in ("stl10", "caltech101"):
        registered = (tfds.core.tfds_path("datasets") / name / "checksums.tsv").read_text().split()
        (item,) = CATALOGUE[name].downloads
        assert [item.url, str(item.num_bytes), item.sha256] == registered[:3]


def test_the_command_says_where_it_is_and_what_was_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CATALOGUE, "birds225", BIRDS)
    members = birds_members() | {"train/ALBATROSS/9.jpg": b"x"}
    raw = write_zip(tmp_path / "raw" / "birds.zip", members)
    assert main(["prepare", "birds225", "--raw", str(raw), "--data-dir", str(tmp_path / "data")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"birds225 is prepared in {tmp_path / 'data' / 'birds225' / '1.0.0'}\ntrain on it with: ")
    assert "check birds225: 100%" in err and "prepare birds225: 100%" in err
    assert "warning: birds225: 1 images cannot be decoded: train/ALBATROSS/9.jpg; left out\n" in err


@pytest.mark.parametrize("linked", ["the folder", "a split", "classes", "in a circle"])
def test_linked_folders_are_entered(tmp_path, linked):
    members = fruits_members()
    real = write_files(tmp_path / "real", members) / "fruits-360"
    raw = tmp_path / "raw"
    if linked == "the folder":
        raw.symlink_to(real)
    elif linked == "a split":
        raw.mkdir()
        for split in ("Training", "Test"):
            (raw / split).symlink_to(real / split)
    else:
        for split in ("Training", "Test"):
            (raw / split).mkdir(parents=True)
            for folder in (real / split).iterdir():
                (raw / split / folder.name).symlink_to(folder)
        if linked == "in a circle":
            (raw / "again").symlink_to(raw)
    found = prepare(FRUITS, tmp_path, raw)
    assert pictures(found.train) == expected(members, "Training", found.class_names)
    assert pictures(found.test) == expected(members, "Test", found.class_names)


def test_a_link_that_bears_the_folders_name(tmp_path):
    members = {path: content for path, content in caltech_members().items() if content is not None}
    real = write_files(tmp_path / "real", members) / "101_ObjectCategories"
    real.rename(tmp_path / "stored")
    (tmp_path / "101_ObjectCategories").symlink_to(tmp_path / "stored")
    assert len(prepare(CALTECH, tmp_path, tmp_path / "101_ObjectCategories").train) == 90
