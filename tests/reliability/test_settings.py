"""Every field of a recipe changes what its help says, on every path that it concerns, or is refused with one line.

`CHANGES` has an entry or more for every field; a field without one fails `test_every_field_is_tried`.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from pspinal_jax.data import load_data
from pspinal_jax.errors import PSpinalError, UsageError
from pspinal_jax.export.directory import read_export
from pspinal_jax.models.build import build_model
from pspinal_jax.recipes import (
    AugmentConfig,
    Card,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    list_recipes,
    load_recipe,
)
from pspinal_jax.recipes.options import RunOptions
from pspinal_jax.recipes.settings import check_settings, check_settings_for
from pspinal_jax.runs import programs
from pspinal_jax.runs.build import split_examples
from pspinal_jax.runs.evaluate import evaluate
from pspinal_jax.runs.export import export_run
from pspinal_jax.runs.features import head_recipe
from pspinal_jax.runs.predict import predict
from pspinal_jax.runs.programs import build_run_programs, schedule_of
from pspinal_jax.runs.progress import TrainingProgress, make_stages
from pspinal_jax.runs.restore import load_recipe_of
from pspinal_jax.runs.train import train
from pspinal_jax.training.optimizers import learning_rates
from pspinal_jax.training.programs import make_order

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
    monkeypatch.setattr(programs, "build_programs", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(programs, "make_optimizer", lambda *arguments: arguments)
    pool = data.train if data.validation is None else data.train.join(data.validation)
    weights = programs.class_weights(recipe, pool.labels[train_indices], data.num_classes)
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


EFFECT = None
RESNET = {"model.backbone": "resnet18", "data.image_size": 32}
FROZEN = {**RESNET, "freeze": "backbone"}
CACHED = {**FROZEN, "cache_features": True}
PAPER = {"protocol": "paper"}
OTHER_KIND = "expected .* for features, which are taken as they are"

# (kind of data, settings that go with it, the changed field and its value, EFFECT or what its refusal says)
CHANGES = [
    ("grey", {}, ("data.path", "other.npz"), EFFECT),
    ("grey", {}, ("data.data_dir", "."), "data.data_dir is .*, expected None without --data.path"),
    ("grey", {}, ("data.num_classes", 3), EFFECT),
    ("folder", {}, ("data.num_classes", 3), "has 2 classes, but data.num_classes is 3"),
    ("grey", {}, ("data.mean", 0.3), EFFECT),
    ("folder", {}, ("data.mean", (0.1, 0.2, 0.3)), EFFECT),
    ("grey", {}, ("data.mean", (0.1, 0.2, 0.3)), "one for each of the 1 channels"),
    ("features", {}, ("data.mean", 0.3), OTHER_KIND),
    ("grey", {}, ("data.std", 0.3), EFFECT),
    ("grey", {}, ("data.std", (0.1, 0.2, 0.3)), "one for each of the 1 channels"),
    ("features", {}, ("data.std", 0.3), OTHER_KIND),
    ("grey", {}, ("data.num_validation", 5), EFFECT),
    ("folder", {}, ("data.num_validation", 5), "image files, which take --data.validation-fraction"),
    ("folder", {}, ("data.image_size", 12), EFFECT),
    ("grey", {"data.num_validation": 0}, ("data.image_size", 12), "is no folder"),
    ("folder", {"data.augment": "rotation_crop_flip"}, ("data.resize", 20), EFFECT),
    ("folder", {}, ("data.resize", 20), "used with --data.augment rotation_crop_flip"),
    ("grey", {}, ("data.resize", 20), "data.resize is 20"),
    ("folder", {}, ("data.validation_fraction", 0.4), EFFECT),
    ("grey", {}, ("data.validation_fraction", 0.4), "arrays take --data.num-validation"),
    ("folder", {}, ("data.test_fraction", 0.4), EFFECT),
    ("grey", {}, ("data.test_fraction", 0.4), "without --data.image-size"),
    ("folder", {}, ("data.strict", True), EFFECT),
    ("grey", {}, ("data.strict", True), "without --data.image-size"),
    ("grey", {}, ("data.split_seed", 1), EFFECT),
    ("folder", {}, ("data.split_seed", 1), EFFECT),
    ("grey", {"data.num_validation": 0}, ("data.split_seed", 1), "nothing is held out"),
    ("grey", {}, ("data.augment", "perspective_rotation"), EFFECT),
    ("folder", {}, ("data.augment", "perspective_rotation"), EFFECT),
    ("folder", {}, ("data.augment", "rotation_crop_flip"), EFFECT),
    ("folder", {}, ("data.augment", "resized_crop_flip"), EFFECT),
    ("grey", {}, ("data.augment", "rotation_crop_flip"), "used with --data.image-size"),
    ("features", {}, ("data.augment", "perspective_rotation"), OTHER_KIND),
    ("grey", {}, ("data.transposed", True), EFFECT),
    ("folder", {}, ("data.transposed", True), "for image files, which are taken as they are"),
    ("features", {}, ("data.transposed", True), "data.transposed takes square images only"),
    ("grey", {"batch_size": 8}, ("data.drop_remainder", False), EFFECT),
    ("grey", {}, ("data.shuffle", False), EFFECT),
    ("folder", {}, ("data.fit", "crop"), EFFECT),
    ("folder", {}, ("data.fit", "pad"), EFFECT),
    ("grey", {}, ("data.fit", "crop"), "arrays have the size that they have"),
    ("folder", {"data.image_size": 32}, ("model.backbone", "resnet18"), EFFECT),
    ("features", {}, ("model.backbone", "resnet18"), "takes colour images"),
    ("grey", {}, ("model.weights", "pretrained"), "used with a ResNet or EfficientNet backbone"),
    ("folder", RESNET, ("model.remat", True), EFFECT),
    ("folder", FROZEN, ("model.remat", True), "unless a ResNet backbone is trained"),
    ("grey", {}, ("model.remat", True), "unless a ResNet backbone is trained"),
    *(("grey", {}, ("model.head", head), EFFECT) for head in ("spinal", "mlp", "dense")),
    ("grey", {}, ("model.layer_width", 6), EFFECT),
    ("grey", {}, ("model.num_layers", 3), EFFECT),
    ("grey", {}, ("model.dropout_rate", 0.3), EFFECT),
    ("grey", {}, ("model.layer_dropout_rate", 0.3), EFFECT),
    ("grey", {"model.head": "spinal"}, ("model.layer_dropout_rate", 0.3), "unless --model.head progressive"),
    ("grey", {}, ("model.norm", "none"), EFFECT),
    ("grey", {}, ("model.implementation", "scan"), EFFECT),
    ("grey", {"model.head": "mlp"}, ("model.implementation", "scan"), "unless --model.head progressive"),
    ("grey", {}, ("optimizer.name", "adam"), EFFECT),
    ("grey", {}, ("optimizer.learning_rate", 0.02), EFFECT),
    ("grey", {}, ("optimizer.momentum", 0.5), EFFECT),
    ("grey", {"optimizer.name": "sgd"}, ("optimizer.nesterov", True), EFFECT),
    *(
        ("grey", {"optimizer.name": name, "optimizer.momentum": momentum}, ("optimizer.nesterov", True), "unless sgd")
        for name, momentum in (("sgd", 0.0), ("adam", 0.9), ("adamw", 0.9))
    ),
    ("grey", {}, ("optimizer.weight_decay", 0.1), EFFECT),
    *(
        ("grey", {"optimizer.name": name}, ("optimizer.weight_decay", 0.1), "unless --optimizer.name adamw")
        for name in ("sgd", "adam")
    ),
    *(("grey", {}, ("optimizer.schedule", name), EFFECT) for name in ("cosine", "one_cycle")),
    (
        "grey",
        {"optimizer.schedule": "step", "optimizer.decay_epochs": 1},
        ("optimizer.schedule", "constant"),
        "decay_epochs is 1.*unless",
    ),
    ("grey", {"optimizer.schedule": "step"}, ("optimizer.decay_epochs", 1), EFFECT),
    ("grey", {}, ("optimizer.decay_epochs", 1), "unless --optimizer.schedule step"),
    ("grey", {"optimizer.schedule": "one_cycle"}, ("optimizer.warmup_fraction", 0.5), EFFECT),
    ("grey", {}, ("optimizer.warmup_fraction", 0.5), "unless --optimizer.schedule one_cycle"),
    ("grey", {}, ("optimizer.warmup_epochs", 0.5), EFFECT),
    (
        "grey",
        {"optimizer.schedule": "one_cycle"},
        ("optimizer.warmup_epochs", 0.5),
        "whose --optimizer.warmup-fraction",
    ),
    ("folder", RESNET, ("optimizer.backbone_rate", 0.1), EFFECT),
    ("folder", FROZEN, ("optimizer.backbone_rate", 0.1), "unless a backbone is trained"),
    ("grey", {}, ("optimizer.backbone_rate", 0.1), "unless a backbone is trained"),
    *((kind, {}, ("augment.mixup", 0.2), EFFECT) for kind in ("grey", "features", "folder")),
    *((kind, {}, ("augment.cutmix", 1.0), EFFECT) for kind in ("grey", "folder")),
    ("features", {}, ("augment.cutmix", 1.0), OTHER_KIND),
    ("folder", CACHED, ("augment.cutmix", 1.0), "features have no boxes"),
    *((kind, {}, ("augment.color_jitter", 0.3), EFFECT) for kind in ("grey", "folder")),
    ("features", {}, ("augment.color_jitter", 0.3), OTHER_KIND),
    ("folder", CACHED, ("augment.color_jitter", 0.3), "see feature_views"),
    ("folder", {"data.augment": "resized_crop_flip"}, ("augment.min_area", 0.5), EFFECT),
    ("folder", {}, ("augment.min_area", 0.5), "unless --data.augment resized_crop_flip"),
    ("grey", {}, ("optimizer.steering", "best_on_test"), "none unless --protocol paper"),
    ("grey", {}, ("epochs", 3), EFFECT),
    ("grey", {}, ("batch_size", 8), EFFECT),
    ("grey", {}, ("eval_batch_size", 8), EFFECT),
    ("grey", {}, ("micro_batches", 2), EFFECT),
    ("grey", {}, ("on_nonfinite", "skip"), EFFECT),
    ("folder", RESNET, ("freeze", "backbone"), EFFECT),
    ("grey", {}, ("freeze", "backbone"), "none where there is no backbone"),
    ("grey", {}, ("cache_features", True), "used with --freeze backbone"),
    ("folder", RESNET, ("cache_features", True), "used with --freeze backbone"),
    ("folder", CACHED, ("feature_views", 2), "all views would be the same"),
    ("folder", FROZEN, ("feature_views", 2), "used with cache_features"),
    ("grey", {}, ("label_smoothing", 0.1), EFFECT),
    ("grey", {}, ("class_weights", "balanced"), EFFECT),
    ("grey", {"sampler": "balanced"}, ("class_weights", "balanced"), "none with --sampler balanced"),
    ("grey", {}, ("sampler", "balanced"), EFFECT),
    ("grey", {"data.shuffle": False}, ("sampler", "balanced"), "none without --data.shuffle"),
    ("grey", {}, ("gradient_clip", 1.0), EFFECT),
    ("grey", {}, ("ema_decay", 0.9), EFFECT),
    ("grey", PAPER, ("ema_decay", 0.9), "0 with --protocol paper"),
    ("grey", PAPER, ("patience", 1), "0 with --protocol paper"),
    ("grey", {"data.num_validation": 0}, ("patience", 1), "expected 0 where nothing is held out"),
    ("grey", {}, ("seed", 1), EFFECT),
    ("folder", {"num_seeds": 2}, ("seed_mode", "vmap"), "loop or auto for image files"),
    ("grey", {"num_seeds": 2}, ("seed_mode", "vmap"), EFFECT),
    ("grey", {}, ("batch_norm", "per_device"), EFFECT),
    ("grey", {"model.norm": "none"}, ("batch_norm", "per_device"), "where the model has no batch norm"),
    ("grey", {}, ("dtype", "bfloat16"), EFFECT),
    ("grey", {}, ("protocol", "paper"), EFFECT),
    ("grey", PAPER, ("rounds", 2), EFFECT),
    ("grey", {}, ("rounds", 2), "1 unless --protocol paper"),
    ("grey", {}, ("retrain", True), EFFECT),
    ("grey", PAPER, ("retrain", True), "False with --protocol paper"),
    ("grey", {"data.num_validation": 0}, ("retrain", True), "expected False where nothing is held out"),
    ("folder", {"data.validation_fraction": 0.0}, ("retrain", True), "with --data.validation-fraction"),
    ("grey", {}, ("mesh", MeshConfig(model=64)), "mesh.model is 64|the number of devices"),
]

ELSEWHERE = {
    "data.name": "which data set is read where no path is given: tests/data/test_prepare_sets.py",
    "num_seeds": "trained one after the other or together: tests/runs/test_train.py",
    "optimizer.steering": "draws learning rates while it trains: tests/runs/test_train.py (also refused above)",
    "cache_features": "the head trains on features: tests/runs/test_photographs.py (also refused above)",
    "feature_views": "passes over the training data: tests/runs/test_photographs.py (also refused above)",
    "patience": "ends a run early: tests/runs/test_training_recipes.py (also refused above)",
    "model.weights": "read before the first step: tests/weights (also refused above)",
    "mesh": "where numbers lie, not what they are: tests/training/test_devices.py (also refused above)",
}
"""Fields whose effect is shown by whole runs in other tests."""


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
    ("grey", {}),
    pytest.param(
        "grey", {"data.mean": 0.4, "data.std": 0.2, "data.augment": "perspective_rotation"}, marks=pytest.mark.slow
    ),
    pytest.param("grey", {"data.transposed": True, "model.head": "mlp", "dtype": "bfloat16"}),
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
        assert -np.log(probabilities).mean() == pytest.approx(report["loss"], rel=tolerance)
    if kind == "grey":
        probabilities = np.asarray(program(np.stack(images)[..., None]))[np.arange(len(labels)), labels]
        assert -np.log(probabilities).mean() == pytest.approx(report["loss"], rel=tolerance)


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
    with pytest.raises(UsageError, match=r"optimizer.weight_decay is 0.2, expected 0.0 unless --optimizer.name adamw"):
        check_settings(dataclasses.replace(recipe, optimizer=dataclasses.replace(sgd, weight_decay=0.2)))
