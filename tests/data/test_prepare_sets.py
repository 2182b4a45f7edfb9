"""Each of the six sets, from tiny files in the format it is published in, through prepare and load_data."""

import zipfile

import numpy as np
import pytest
from raw_files import NUM_CLASSES, examples, raw_contents, write_raw

from pspinal_jax.data import load_data
from pspinal_jax.data.catalogue import CATALOGUE, find_data_set
from pspinal_jax.data.prepare import prepare_data_set
from pspinal_jax.errors import UsageError
from pspinal_jax.recipes import DataConfig

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CLASS_NAMES = {
    "mnist": DIGITS,
    "fashion_mnist": FASHION,
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "qmnist": DIGITS,
    "emnist_digits": DIGITS,
    "emnist_letters": LETTERS,
}


def prepare(name, data_dir, **source):
    return prepare_data_set(CATALOGUE[name], data_dir, **source).directory


def assert_holds(data_dir, name, made):
    data = load_data(DataConfig(name, data_dir=data_dir))
    assert data.class_names == CLASS_NAMES[name]
    for split, (images, labels) in made.items():
        here = getattr(data, split)
        np.testing.assert_array_equal(here.inputs[..., 0], images)
        np.testing.assert_array_equal(here.labels, labels)
        assert here.inputs.shape == (len(labels), 28, 28, 1) and here.inputs.dtype == np.uint8


@pytest.mark.parametrize("name", NUM_CLASSES)
def test_raw_files_come_back_upright_in_order_with_labels_and_class_names(tmp_path, name):
    made = examples(NUM_CLASSES[name])
    raw = write_raw(tmp_path / "raw", name, made)
    assert prepare(name, tmp_path / "data", raw=raw) == tmp_path / "data" / name / "1.0.0"
    assert_holds(tmp_path / "data", name, made)


def test_decompressed_files_are_read_too(tmp_path):
    made = examples(10)
    for file, content in raw_contents("mnist", made).items():
        (tmp_path / file.removesuffix(".gz")).write_bytes(content)
    prepare("mnist", tmp_path / "data", raw=tmp_path)
    assert_holds(tmp_path / "data", "mnist", made)


@pytest.mark.parametrize("place", ["the zip", "extracted", "inside"])
def test_emnist_is_taken_from_the_zip_or_from_what_it_extracts_to(tmp_path, place):
    made = examples(26)
    raw = write_raw(tmp_path / "raw", "emnist_letters", made)
    if place != "the zip":
        with zipfile.ZipFile(raw / "gzip.zip") as archive:
            archive.extractall(raw)
        (raw / "gzip.zip").unlink()
    source = {"the zip": raw / "gzip.zip", "extracted": raw, "inside": raw / "gzip"}[place]
    prepare("emnist_letters", tmp_path / "data", raw=source)
    assert_holds(tmp_path / "data", "emnist_letters", made)


def test_an_npz_file_gives_the_same_data_set(tmp_path):
    made = examples(26)
    write_raw(tmp_path / "raw", "emnist_letters", made)
    arrays = {
        f"{split}_{kind}": array
        for split in made
        for kind, array in zip(("images", "labels"), made[split], strict=True)
    }
    np.savez(tmp_path / "letters.npz", **arrays)
    prepare("emnist_letters", tmp_path / "a", npz=tmp_path / "letters.npz")
    prepare("emnist_letters", tmp_path / "b", raw=tmp_path / "raw")
    assert_holds(tmp_path / "a", "emnist_letters", made)
    prints = [load_data(DataConfig("emnist_letters", data_dir=tmp_path / folder)).fingerprint() for folder in "ab"]
    assert prints[0] == prints[1]


def test_qmnist_has_its_test_split_in_two_parts(tmp_path):
    import tensorflow_datasets as tfds

    made = examples(10)
    images = np.zeros((10_003, 28, 28), np.uint8)
    images[9_999:, 0, 0] = (1, 2, 3, 4)
    made["test"] = (images, (np.arange(10_003) % 7).astype(np.uint8))
    builder = tfds.builder_from_directory(
        prepare("qmnist", tmp_path / "data", raw=write_raw(tmp_path / "raw", "qmnist", made))
    )
    parts = {name: builder.as_data_source(name) for name in ("test10k", "test50k")}
    assert {name: len(part) for name, part in parts.items()} == {"test10k": 10_000, "test50k": 3}
    assert parts["test10k"][9_999]["image"][0, 0, 0] == 1
    assert [(int(example["image"][0, 0, 0]), int(example["label"])) for example in parts["test50k"]] == [
        (2 + place, (10_000 + place) % 7) for place in range(3)
    ]


def test_what_is_prepared_is_left_as_it_is(tmp_path):
    raw = write_raw(tmp_path / "raw", "mnist", examples(10))
    first = prepare_data_set(CATALOGUE["mnist"], tmp_path / "data", raw=raw)
    other = write_raw(tmp_path / "other", "mnist", examples(10, seed=1))
    again = prepare_data_set(CATALOGUE["mnist"], tmp_path / "data", raw=other)
    assert again.was_there and not first.was_there and again.directory == first.directory
    assert_holds(tmp_path / "data", "mnist", examples(10))


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    raw = write_raw(tmp_path / "raw", "mnist", examples(10))
    left = tmp_path / "data" / "mnist" / "incomplete.ABCDEF_1.0.0"
    other = tmp_path / "data" / "mnist" / "incomplete.ABCDEF_3.0.1"  # TFDS's own, not ours to remove
    for folder in (left, other):
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    assert not prepare_data_set(CATALOGUE["mnist"], tmp_path / "data", raw=raw).was_there
    assert not left.exists() and other.exists()
    assert_holds(tmp_path / "data", "mnist", examples(10))


def test_a_recipes_spelling_is_understood_and_a_wrong_one_refused():
    assert find_data_set("emnist-letters").name == "emnist_letters"
    with pytest.raises(UsageError, match=r"unknown data set 'emnist_leters', expected one of digits"):
        find_data_set("emnist_leters")


def test_addresses_checksums_and_sizes_are_those_of_tfds():
    import tensorflow_datasets as tfds

    folder = tfds.core.tfds_path("url_checksums")
    for name in ("mnist", "fashion_mnist", "kmnist", "emnist_digits", "emnist_letters"):
        lines = (folder / f"{CATALOGUE[name].folder}.txt").read_text().splitlines()
        registered = {tuple(line.split("\t")) for line in lines}
        ours = {(item.url, str(item.num_bytes), item.sha256, item.file) for item in CATALOGUE[name].downloads}
        assert ours == registered
