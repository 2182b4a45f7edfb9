"""What a training says before it starts, and at its end."""

import dataclasses
import re

import numpy as np
import pytest

from pspinal_jax.data import load_data
from pspinal_jax.models import build_model
from pspinal_jax.recipes import DataConfig, ModelConfig, load_recipe
from pspinal_jax.runs.build import make_stages, split_examples
from pspinal_jax.runs.report import class_counts, describe_result, describe_start


def summary(recipe, init_from=None):
    data = load_data(recipe.data)
    model = build_model(recipe, data.example_shape, data.num_classes)
    stages = make_stages(recipe, *split_examples(recipe, data))
    return describe_start(recipe, init_from, data, model, stages), data


@pytest.fixture
def recipe(npz_path):
    data = DataConfig("digits", path=npz_path, num_classes=3, num_validation=20)
    return dataclasses.replace(load_recipe("digits"), data=data, batch_size=16, epochs=5)


def test_the_counts_are_those_of_the_splits_that_are_trained_and_tested_on(recipe, arrays):
    lines, data = summary(recipe)
    train, validation = split_examples(recipe, data)
    labels = arrays["train_labels"]
    counts = class_counts(recipe, data)
    np.testing.assert_array_equal(counts["train"], np.bincount(labels[train], minlength=3))
    np.testing.assert_array_equal(counts["validation"], np.bincount(labels[validation], minlength=3))
    assert "3 classes; examples: train 76, validation 20, test 50" in lines[0]
    assert lines[2].split() == ["0", *(str(of_split[0]) for of_split in counts.values())]
    assert "4 x 4 x 1 uint8" in lines[-3] and "trained: all" in lines[-2]
    assert "train: 5 epochs of 4 steps of 16 examples" in lines[-1] and lines[-1].startswith("cpu (")


def test_many_classes_are_told_by_the_smallest_and_the_largest(tmp_path, recipe):
    labels = np.repeat(np.arange(20), np.arange(2, 22))
    images = np.zeros((len(labels), 4, 4), np.uint8)
    path = tmp_path / "many.npz"
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    data = DataConfig("digits", path=path, num_validation=0)
    lines, _ = summary(dataclasses.replace(recipe, data=data, retrain=False))
    assert lines[1] == "  in train 2 to 21 examples a class, median 12"
    assert "validation" not in lines[0] and len(lines) == 5


def test_what_is_frozen_is_not_counted_as_trained(recipe, tmp_path):
    model = ModelConfig(backbone="resnet18", weights=None, layer_width=8)
    images = np.zeros((40, 32, 32, 3), np.uint8)
    path, labels = tmp_path / "colour.npz", np.arange(40) % 2
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    data = DataConfig("digits", path=path, num_validation=8)
    frozen = dataclasses.replace(recipe, model=model, data=data, freeze="backbone")
    *_, parameters, _ = summary(frozen)[0]
    total, trained = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d", parameters))
    assert total - trained == 11_176_512  # of ResNet-18 without its classifier
    assert "backbone resnet18; progressive head (4 layers of 8); weights random" in summary(frozen)[0][-3]


def test_the_end_names_the_worst_classes_first_and_older_results_are_told_as_before():
    def of_seeds(mean):
        return {"mean": mean, "std": None, "each": [mean]}

    result = {"test_accuracy": of_seeds(0.9), "selection": "best epoch", "published_accuracy_percent": None}
    assert describe_result(result).splitlines() == ["test accuracy 90.00 %  (best epoch)"]
    names = [("a", 90, 1.0), ("b\x1b", 10, 0.25), ("none", 0, None)] + [(f"c{i}", 5, 0.5 + i / 20) for i in range(8)]
    result["test_balanced_accuracy"] = of_seeds(0.6)
    result["test_classes"] = [{"name": name, "support": many, "recall": [recall]} for name, many, recall in names]
    lines = describe_result(result).splitlines()
    assert lines[1].startswith("balanced accuracy 60.00 %") and lines[2].split() == ["b\\x1b", "25.00", "%", "of", "10"]
    assert "(without test examples: none)" in lines[1]
    assert len(lines) == 9 and lines[-1] == "  and 4 more classes"
