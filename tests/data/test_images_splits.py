"""Splits of images: taking some, holding out a validation split, noticing a change."""

import dataclasses

import numpy as np
import pytest
from images_support import InMemory, numbered, picture

from pspinal_jax.data import Dataset
from pspinal_jax.data.images import ImageSplit
from pspinal_jax.errors import UsageError


def dataset(labels=(0,) * 10 + (1,) * 7 + (2,)):
    labels = np.array(labels, np.int32)
    images = ImageSplit(InMemory([picture(i) for i in range(len(labels))]), labels)
    return Dataset({"train": images, "test": numbered(4)}, ("a", "b", "c"), "memory", (4, 4, 3))


def changed(data, **splits):
    return dataclasses.replace(data, splits={**data.splits, **splits})


def names(split):
    return [split.encoded.name(index) for index in range(len(split))]


def test_taking_twice_is_taking_of_what_was_taken():
    split = numbered(9).take(np.array([8, 1, 5, 5])).take(np.array([2, 0]))
    assert names(split) == ["picture 5", "picture 8"] and len(split) == len(split.encoded) == 2
    assert split.encoded[1] == picture(8) and split.labels.tolist() == [2, 2]


def test_validation_comes_out_of_every_class_by_seed_and_leaves_one():
    data = dataset()
    held = data.with_validation(0.3, seed=0)
    assert np.bincount(held.validation.labels, minlength=3).tolist() == [3, 2, 0]
    assert sorted(names(held.train) + names(held.validation)) == sorted(names(data.train))
    assert names(held.validation) == names(data.with_validation(0.3, seed=0).validation)
    assert names(held.validation) != names(data.with_validation(0.3, seed=1).validation)
    assert held.test is data.test and held.class_names == data.class_names
    assert np.bincount(data.with_validation(0.99, seed=0).train.labels).tolist() == [1, 1, 1]


def test_validation_is_left_alone_where_there_is_one_or_none_is_wanted():
    data = dataset()
    assert data.with_validation(0.0, seed=0) is data and data.with_validation(0.01, seed=0) is data
    own = changed(data, validation=numbered(2))
    assert own.with_validation(0.5, seed=0) is own
    for fraction in (-0.1, 1.0):
        with pytest.raises(UsageError, match="the validation fraction is"):
            data.with_validation(fraction, seed=0)


def test_the_fingerprint_changes_with_images_labels_names_and_splits():
    data = dataset()
    moved = data.train.labels.copy()
    moved[0] = 1
    others = [
        dataset((0,) * 10 + (1,) * 8),
        changed(data, train=ImageSplit(data.train.encoded, moved)),
        changed(data, test=numbered(5)),
        dataclasses.replace(data, class_names=("a", "b", "d")),
        data.with_validation(0.3, seed=0),
        data.with_validation(0.3, seed=1),
    ]
    prints = {each.fingerprint() for each in [data, *others]}
    assert len(prints) == 7 and dataset().fingerprint() == data.fingerprint()
