"""Folders of class folders: what is read, what is passed over, what is refused."""

import json
import os

import numpy as np
import pytest
from images_support import picture

from pspinal_jax.data import folder as folders
from pspinal_jax.data.folder import read_folder
from pspinal_jax.data.images.decode import decode
from pspinal_jax.data.load import load_data
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.recipes import DataConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PSPINAL_JAX_CACHE", raising=False)
    return tmp_path / "cache" / "pspinal_jax" / "pictures"


def write(root, classes):
    """Files NUMBER.png for every number of each class folder."""
    for name, numbers in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            (root / name / f"{number}.png").write_bytes(picture(number))
    return root


def read(path, **options):
    return read_folder(path, **({"image_size": 8, "test_fraction": 0.25, "split_seed": 0, "strict": False} | options))


def shown(photos):
    """(what the picture shows, its label) of every photo."""
    return [(int(decode(photos.encoded[i], (2, 2))[0, 0, 0]), int(photos.labels[i])) for i in range(len(photos))]


@pytest.mark.parametrize(
    "names",
    [("train", "valid", "test"), ("Training", "Validation", "Test"), ("TRAIN", "val", "TEST"), ("train", None, "test")],
)
def test_folders_of_splits(tmp_path, names):
    parts = ({"b c": [3, 1], "a": [2]}, {"a": [10], "b c": [11]}, {"a": [20, 21], "b c": [22]})
    for name, classes in zip(names, parts, strict=True):
        if name:
            write(tmp_path / "set" / name, classes)
    write(tmp_path / "set", {"another folder": [99], ".hidden": [98]})
    data = read(tmp_path / "set")
    assert data.class_names == ("a", "b c") and data.num_classes == 2 and data.skipped == ()
    assert data.source == str(tmp_path / "set")
    assert shown(data.train) == [(2, 0), (1, 1), (3, 1)] and data.train.labels.dtype == np.int32
    assert shown(data.test) == [(20, 0), (21, 0), (22, 1)]
    assert (data.validation is None) == (names[1] is None)
    if data.validation is not None:
        assert shown(data.validation) == [(10, 0), (11, 1)]
        assert data.with_validation(0.5, 0) is data


def test_a_folder_of_classes_is_split_by_class_and_seed(tmp_path):
    write(tmp_path / "set", {"few": range(4), "many": range(100, 120), "one": [200], "train": [201, 202]})
    data = read(tmp_path / "set")
    assert data.class_names == ("few", "many", "one", "train")
    everything = shown(data.train) + shown(data.test)
    assert sorted(number for number, _ in everything) == [*range(4), *range(100, 120), 200, 201, 202]
    assert np.bincount(data.test.labels, minlength=4).tolist() == [1, 5, 0, 0]
    assert all((number >= 100) + (number >= 200) + (number > 200) == label for number, label in everything)
    assert shown(read(tmp_path / "set").test) == shown(data.test)
    assert shown(read(tmp_path / "set", split_seed=1).test) != shown(data.test)
    assert data.train.encoded.name(0).startswith(str(tmp_path / "set" / "few"))


def test_what_is_no_picture_is_passed_over_and_links_and_subfolders_are_followed(tmp_path, capsys):
    root = write(tmp_path / "set", {"a": [1, 2], "b/deeper": [3], "b/.git": [50], "c": []})
    for name in ("a/notes.txt", "a/Thumbs.db", "a/.DS_Store", "a/.7.png", "b/tmp", "README.md"):
        (root / name).write_text("x")
    (root / "b" / "linked.PNG").symlink_to(root / "a" / "2.png")
    (root / "c").rmdir()
    (root / "c").symlink_to(root / "a")
    data = read(root, test_fraction=0.5)
    assert sorted(shown(data.train) + shown(data.test)) == [(1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (3, 1)]
    left = f"warning: {root}: left out 5 files in class folders with another suffix (.db, .txt, no suffix)"
    assert capsys.readouterr().err == f"{left}: a/Thumbs.db, a/notes.txt, b/tmp, c/Thumbs.db, c/notes.txt\n"


def damaged(tmp_path, count=2):
    root = write(tmp_path / "set", {"a": range(4), "b": range(4)})
    for number in range(count):
        (root / "a" / f"bad {number}.jpg").write_bytes(b"no picture")
    return root


def test_damaged_pictures_are_named_left_out_and_counted(tmp_path, capsys):
    root = damaged(tmp_path, 7)
    (root / "b" / "gone.png").symlink_to(root / "nothing")
    data = read(root)
    assert len(data.train) + len(data.test) == 8
    assert data.skipped == (*(f"a/bad {number}.jpg" for number in range(7)), "b/gone.png")
    first = ", ".join(f"a/bad {number}.jpg (its format is not known)" for number in range(5))
    assert capsys.readouterr().err == f"warning: {root}: 8 images cannot be decoded: {first}, ..; left out\n"


def test_strictly_a_damaged_picture_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"set: 2 images cannot be decoded: a/bad 0.jpg \(.*\), a/bad 1.jpg"):
        read(damaged(tmp_path), strict=True)
    (tmp_path / "set" / "a" / "bad 0.jpg").unlink()
    with pytest.raises(DataError, match=r"set: 1 images cannot be decoded: a/bad 1.jpg \(.*\); repair"):
        read(tmp_path / "set", strict=True)


def bad_class(root):
    (root / "b" / "1.png").write_bytes(b"")


REFUSED = {
    "no folder": ({}, None, {}, r"set is not a folder"),
    "one class": ({"a": [1]}, None, {}, r"holds 1 class folders with images in them \(a\), expected two"),
    "nothing": ({".a": [1], ".b": [1]}, None, {}, r"holds 0 class folders with images in them \(\), expected two"),
    "one class that is not empty": (
        {"a": [1], "b": []},
        None,
        {},
        r"holds 1 class folders with images in them \(a\), expected two",
    ),
    "an unreadable class": ({"a": [1], "b": [1]}, bad_class, {}, r"set/b holds no image that can be decoded"),
    "an empty class in test": (
        {"train/a": [1], "train/b": [1], "test/a": [1], "test/b": []},
        None,
        {},
        r"set/test/b holds no image",
    ),
    "a class that test lacks": (
        {"train/a": [1], "train/b": [1], "train/c": [1], "test/b": [1]},
        None,
        {},
        r"set/test lacks classes that another split has: a, c",
    ),
    "a class that train lacks": (
        {"Training/a": [1], "Test/a": [1], "Test/b": [1]},
        None,
        {},
        r"set/Training lacks classes that another split has: b",
    ),
    "two folders for a split": (
        {"train/a": [1], "test/a": [1], "val/a": [1], "valid/a": [1]},
        None,
        {},
        r"holds val and valid; keep one folder for the validation split",
    ),
    "a split alone": (
        {"valid/a": [1], "valid/b": [1]},
        None,
        {},
        r"\(valid\), expected two or more",
    ),
    "a folder too many": (
        {"birds/a": [1], "birds/b": [1]},
        None,
        {},
        r"\(birds\), expected two or more",
    ),
    "splits a folder down": (
        {"birds/train/a": [1], "birds/test/a": [1]},
        None,
        {},
        r"\(birds\), expected two or more",
    ),
    "no train": (
        {"valid/a": [1], "valid/b": [1], "test/a": [1], "test/b": [1], "test/c": [1]},
        None,
        {},
        r"holds valid and test, expected a folder train",
    ),
    "train alone": (
        {"train/a": [1], "train/b": [1]},
        None,
        {},
        r"set holds train, expected a folder train",
    ),
    "no test": (
        {"train/a": [1], "train/b": [1], "val/a": [1]},
        None,
        {},
        r"holds train and val, expected a folder",
    ),
    "too few to test on": ({"a": [1, 2], "b": [1]}, None, {"test_fraction": 0.1}, r"too few images to test on 0.1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(tmp_path, case):
    classes, change, options, message = REFUSED[case]
    write(tmp_path / "set", classes)
    if change:
        change(tmp_path / "set")
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "set", **options)
    assert "\n" not in str(caught.value)


def test_empty_class_folders_are_left_out_with_a_warning(tmp_path, capsys):
    root = write(tmp_path / "flat", {"a": [1, 2, 3, 4], "b": [5, 6, 7, 8], "c": [], "d": []})
    data = read(root)
    assert (
        data.class_names == ("a", "b")
        and f"{root}: left out 2 class folders without an image: c, d" in data.passed_over
    )
    assert f"warning: {root}: left out 2 class folders without an image: c, d\n" in capsys.readouterr().err
    write(tmp_path / "split", {"train/a": [1], "train/b": [1], "train/c": [], "test/a": [2], "test/b": [3]})
    assert read(tmp_path / "split").class_names == ("a", "b")


def test_classes_may_be_called_as_splits_are(tmp_path):
    assert read(write(tmp_path, {"test": [1, 2, 3, 4], "valid": [5, 6, 7, 8]})).class_names == ("test", "valid")


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_the_test_fraction_lies_between_0_and_1(tmp_path, fraction):
    write(tmp_path / "set", {"a": [1, 2], "b": [1]})
    with pytest.raises(UsageError, match="test_fraction is"):
        read(tmp_path / "set", test_fraction=fraction)


def count_decoded(monkeypatch):
    seen, original = [], folders.check

    def check(encoded, indices, *args):
        seen.extend(encoded.files[index] for index in indices)
        return original(encoded, indices, *args)

    monkeypatch.setattr(folders, "check", check)
    return seen


def test_a_second_start_decodes_only_what_changed(tmp_path, cache, monkeypatch, capsys):
    root = damaged(tmp_path, 1)
    seen = count_decoded(monkeypatch)
    first = read(root)
    assert len(seen) == 9 and len(list(cache.iterdir())) == 1
    seen.clear()
    assert read(root).fingerprint() == first.fingerprint()
    assert seen == ["a/bad 0.jpg"]  # a newer Pillow might read it
    seen.clear()
    (root / "a" / "0.png").write_bytes(picture(77))
    os.utime(root / "a" / "0.png", ns=(1, 1))
    assert read(root).fingerprint() != first.fingerprint()
    assert seen == ["a/0.png", "a/bad 0.jpg"]
    assert capsys.readouterr().err.count(": 1 images cannot be decoded") == 3


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"format": 1, "files": {"a/0.png": [1]}}', b'{"format": 0, "files": {}}']
)
def test_a_damaged_memory_is_ignored(tmp_path, cache, content):
    root = write(tmp_path / "set", {"a": range(4), "b": range(4)})
    first = read(root).fingerprint()
    (stored,) = cache.iterdir()
    stored.write_bytes(content)
    assert read(root).fingerprint() == first
    assert len(json.loads(stored.read_bytes())["files"]) == 8


def test_where_nothing_can_be_kept_it_works_all_the_same(tmp_path, cache, monkeypatch):
    root = write(tmp_path / "set", {"a": range(4), "b": range(4)})
    monkeypatch.setenv("PSPINAL_JAX_CACHE", "off")
    first = read(root).fingerprint()
    assert not cache.exists()
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("PSPINAL_JAX_CACHE", str(tmp_path / "file"))
    assert read(root).fingerprint() == first


def test_the_fingerprint_is_that_of_the_contents(tmp_path):
    root = write(tmp_path / "set", {"a": range(4), "b": range(4)})
    first = read(root).fingerprint()
    os.utime(root / "a" / "0.png", ns=(5, 5))
    assert read(root).fingerprint() == first
    assert read(write(tmp_path / "copy", {"a": range(4), "b": range(4)})).fingerprint() == first
    assert read(root, split_seed=3).fingerprint() != first
    (root / "a" / "0.png").rename(root / "b" / "9.png")
    assert read(root).fingerprint() != first


def test_load_data_takes_a_folder_with_as_many_classes_as_named(tmp_path):
    folder = write(tmp_path / "pictures", {"cats": range(4), "dogs": range(4, 8)})
    data = load_data(DataConfig(name="own", path=folder, image_size=8, num_classes=2, test_fraction=0.25))
    assert data.num_classes == 2
    with pytest.raises(DataError, match=r"pictures has 2 classes, but data.num_classes is 3"):
        load_data(DataConfig(name="own", path=folder, image_size=8, num_classes=3, test_fraction=0.25))
    with pytest.raises(DataError, match=r"4.png is not a folder"):
        load_data(DataConfig(name="own", path=folder / "dogs" / "4.png", image_size=8))
