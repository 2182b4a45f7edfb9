"""Every field of a recipe changes what its help says, on every path that it concerns, or is refused with one line.

`CHANGES` of setting_changes.py has an entry or more for every field; a field without one fails.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from setting_changes import CACHED, CHANGES, EFFECT, ELSEWHERE

from pspinal_jax.data import load_data
from pspinal_jax.errors import PSpinalError, UsageError
from pspinal_jax.models import build_model
from pspinal_jax.recipes import (
    AugmentConfig,
    Card,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    list_recipes,
    load_recipe,
)
from pspinal_jax.recipes.rules import check_settings, check_settings_for
from pspinal_jax.recipes.schema import RunOptions
from pspinal_jax.runs import build
from pspinal_jax.runs.build import build_run_programs, make_stages, schedule_of, split_examples
from pspinal_jax.runs.directory import load_recipe_of
from pspinal_jax.runs.evaluate import evaluate
from pspinal_jax.runs.export import export_run, read_export
from pspinal_jax.runs.predict import predict
from pspinal_jax.runs.result import head_recipe
from pspinal_jax.runs.train import train
from pspinal_jax.training.keys import make_order
from pspinal_jax.training.optimizers import learning_rates
from pspinal_jax.training.stages import TrainingProgress

SIDE = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Grey images and features as .npz, and a folder of class folders; image i of a class is unlike its transpose."""
    place, rng = tmp_path_factory.mktemp("settings"), np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = rng.integers(0, 60, (40, SIDE, SIDE), np.uint8)
    images[labels == 0, : SIDE // 2] += 150
    images[labels == 1, :, : SIDE // 2] += 150
    for name, inputs in (("grey", images), ("features", images.reshape(40, -1).astype(np.float32))):
        arrays = {"train_images": inputs, "train_labels": labels, "test_images": inputs, "test_labels": labels}
        np.savez(place / f"{name}.npz", **arrays)
    np.savez(place / "other.npz", **{**arrays, "train_images": images + 1, "test_images": images})
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = place / "folder" / f"class_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([image] * 3, -1)).save(folder / f"{index:02}.png")
    return place


def recipe_for(kind, place):
    """A recipe on grey images, features or image files, in which every setting has an effect."""
    data = DataConfig("small", path=place / f"{kind}.npz", num_validation=10, num_classes=2)
    if kind == "folder":
        data = DataConfig("small", path=place / kind, image_size=SIDE, validation_fraction=0.2)
    head = ModelConfig(layer_width=4, num_layers=2, dropout_rate=0.0, norm="batch")
    optimizer = OptimizerConfig("adamw", learning_rate=0.01)
    card = Card("small", "none", "head")
    return Recipe(card, data, head, optimizer, epochs=2, batch_size=10, eval_batch_size=10)


def changed(recipe, changes):
    """`recipe` with other values of dotted names, all at once."""
    fields = {}
    for name, value in changes.items():
        config, _, field = name.rpartition(".")
        part = fields.get(config, getattr(recipe, config)) if config else None
        fields[config or name] = dataclasses.replace(part, **{field: value}) if config else value
    return dataclasses.replace(recipe, **fields)


def seen(recipe, monkeypatch):
    """All that decides a run of `recipe`: its data, model, programs, learning rates, orders and stages."""
    check_settings(recipe)
    data = load_data(recipe.data)
    if recipe.data.image_size is not None and recipe.protocol == "validation":
        data = data.with_validation(recipe.data.validation_fraction, recipe.data.split_seed)
    shape, dtype = (data.example_shape, data.example_dtype)
    check_settings_for(recipe, data.source, shape)
    train_indices, validation = split_examples(recipe, data)
    stages = make_stages(recipe, train_indices, validation)
    model = build_model(recipe, shape, data.num_classes)
    calls = []
    monkeypatch.setattr(build, "Programs", lambda *arguments, **options: calls.append((*arguments, options)))
    monkeypatch.setattr(build, "make_optimizer", lambda *arguments: arguments)
    pool = data.train if data.validation is None else data.train.join(data.validation)
    weights = build.class_weights(recipe, pool.labels[train_indices], data.num_classes)
    build_run_programs(recipe, model, shape, dtype, weights=weights)
    balanced = pool.labels if recipe.sampler == "balanced" else None
    order = make_order(stages[0].subset, 60, vectorized=False, shuffle=recipe.data.shuffle, balanced=balanced)
    return {
        "data": (data.fingerprint(), data.num_classes, recipe.data.train_side, recipe.data.strict),
        "stages": [(stage.name, stage.evaluates, stage.steps_per_epoch, stage.subset.tolist()) for stage in stages],
        "epochs": TrainingProgress().stage_epochs(recipe),
        "model": repr(model),
        # An augmentation is a function, or a partial one with its size.
        "programs": [repr(call[1:]) for call in calls],
        "rates": [learning_rates(schedule_of(recipe), epoch, 10, recipe.epochs).tolist() for epoch in range(2)],
        "order": [np.asarray(order(np.uint32(recipe.seed), np.int32(epoch))).tolist() for epoch in range(2)],
    }


def fields():
    parts = {"data": DataConfig, "model": ModelConfig, "optimizer": OptimizerConfig, "augment": AugmentConfig}
    for prefix, config in parts.items():
        yield from (f"{prefix}.{field.name}" for field in dataclasses.fields(config))
    yield from {field.name for field in dataclasses.fields(Recipe)} - {"card", *parts}


def test_every_field_is_tried():
    with_effect = {field for _, _, (field, _), refusal in CHANGES if refusal is EFFECT}
    assert with_effect | set(ELSEWHERE) == set(fields()) - {"data.data_dir"}
    assert {"data.data_dir"} <= {field for _, _, (field, _), _ in CHANGES}


@pytest.mark.parametrize(
    ("kind", "setting", "change", "refusal"),
    [pytest.param(*entry, id=f"{entry[0]}-{entry[2][0]}-{index}") for index, entry in enumerate(CHANGES)],
)
def test_a_setting_changes_the_run_or_is_refused(place, monkeypatch, kind, setting, change, refusal):
    name, value = change
    value = place / value if name in ("data.path", "data.data_dir") else value
    recipe = recipe_for(kind, place)
    if refusal is not EFFECT:
        with pytest.raises(PSpinalError, match=refusal) as caught:
            seen(changed(recipe, {**setting, name: value}), monkeypatch)
        assert "\n" not in str(caught.value)
        return
    before = seen(changed(recipe, setting), monkeypatch)
    after = seen(changed(recipe, {**setting, name: value}), monkeypatch)
    assert before != after


def test_the_same_settings_are_the_same_run(place, monkeypatch):
    """What differs above is not noise, such as an object's address."""
    for kind in ("grey", "features", "folder"):
        assert seen(recipe_for(kind, place), monkeypatch) == seen(recipe_for(kind, place), monkeypatch)


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_uses_all_its_settings(name):
    check_settings(load_recipe(name))


# What the model sees of an image: every path must see the same.
MODEL_SEES = [
    pytest.param("grey", {}, marks=pytest.mark.slow),
    pytest.param(
        "grey", {"data.mean": 0.4, "data.std": 0.2, "data.augment": "perspective_rotation"}, marks=pytest.mark.slow
    ),
    pytest.param("grey", {"data.transposed": True, "model.head": "mlp", "dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param("folder", {}, marks=pytest.mark.slow),
    ("folder", {"data.mean": (0.4, 0.1, 0.2), "data.std": (0.2, 0.3, 0.4), "data.augment": "rotation_crop_flip"}),
]


@pytest.mark.parametrize(("kind", "setting"), MODEL_SEES, ids=lambda value: value if isinstance(value, str) else None)
def test_training_evaluation_prediction_and_export_see_the_same(place, tmp_path, kind, setting):
    recipe = changed(recipe_for(kind, place), {"optimizer.learning_rate": 0.05, **setting})
    result = train(recipe, RunOptions(workdir=tmp_path / "run"))
    report = evaluate(tmp_path / "run")
    assert report["accuracy"] == pytest.approx(result["test_accuracy"]["mean"])
    data = load_data(recipe.data)
    if kind == "grey":
        with np.load(place / "grey.npz") as arrays:
            images, labels = list(arrays["test_images"]), arrays["test_labels"]
    else:
        images = [Path(data.test.encoded.name(index)) for index in range(len(data.test))]
        labels = data.test.labels
    export_run(tmp_path / "run", tmp_path / "export")
    answers = {name: predict(tmp_path / name, images, top=2) for name in ("run", "export")}
    # The exported program itself takes images as they lie in their files.
    program = jax.jit(read_export(tmp_path / "export").exported.call)
    tolerance = 2e-2 if recipe.dtype == "bfloat16" else 1e-3
    true = [data.class_names[label] for label in labels]
    for given in answers.values():
        probabilities = [dict(answer.classes)[name] for answer, name in zip(given, true, strict=True)]
        assert -np.log(probabilities).mean() == pytest.approx(report["loss"], rel=tolerance, abs=1e-6)
    if kind == "grey":
        probabilities = np.asarray(program(np.stack(images)[..., None]))[np.arange(len(labels)), labels]
        assert -np.log(probabilities).mean() == pytest.approx(report["loss"], rel=tolerance, abs=1e-6)


def test_a_run_of_an_earlier_version_opens_as_it_was_trained(place):
    """Runs on image files took --data.transposed, and only predict applied it."""
    settings = dataclasses.asdict(recipe_for("folder", place))
    settings["data"] |= {"transposed": True}
    settings["optimizer"] |= {"nesterov": True}
    where = {key: str(settings["data"].pop(key)) for key in ("path", "data_dir")}
    recipe = load_recipe_of({"identity": settings, "data_location": where})
    assert not recipe.data.transposed and recipe.optimizer.nesterov


def test_what_is_left_to_train_on_cached_features_is_a_recipe(place):
    """Of images, which may have a validation split of their own: it was refused with --retrain."""
    settings = {**CACHED, "retrain": True, "patience": 2, "data.fit": "crop", "augment.mixup": 0.2}
    left = head_recipe(changed(recipe_for("folder", place), settings))
    assert left.retrain and left.patience == 2 and left.augment.mixup == 0.2 and left.data.fit == "squash"


def test_a_refused_setting_leaves_no_directory(place, tmp_path):
    recipe = changed(recipe_for("features", place), {"data.augment": "perspective_rotation"})
    with pytest.raises(UsageError, match=r"data\.augment"):
        train(recipe, RunOptions(workdir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_brings_with_it_refuses_no_other_optimiser():
    """The weight decay of its adamw is the recipe's, not the user's; one that the user sets for sgd is refused."""
    recipe = load_recipe("digits")
    sgd = dataclasses.replace(recipe.optimizer, name="sgd")
    check_settings(dataclasses.replace(recipe, optimizer=sgd))
    with pytest.raises(UsageError, match=r"optimizer.weight_decay is 0.2, expected 0.0 unless optimizer.name=adamw"):
        check_settings(dataclasses.replace(recipe, optimizer=dataclasses.replace(sgd, weight_decay=0.2)))
