"""Rejects settings that would be silently ignored, and fills in those that older runs did not record."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

from pspinal_jax.errors import UsageError
from pspinal_jax.recipes.registry import list_recipes, load_recipe, recipe_of_head
from pspinal_jax.recipes.schema import Card, DataConfig, Recipe


def check_settings(recipe: Recipe) -> None:
    """Check that every setting of `recipe` that differs from its default has an effect.

    Settings of a shipped recipe, or of the recipe for a head on cached features, are not checked. With
    `--optimizer.name sgd`, for example, the recipe's weight decay for adamw has no effect, but the user did not set it.

    Raises:
      UsageError: naming the first setting without an effect, and when it would have one.
    """
    data, model, optimizer = recipe.data, recipe.model, recipe.optimizer
    images, held_out = data.image_size is not None, data.num_validation > 0
    cut = images or data.is_table
    trains_backbone = model.backbone != "none" and recipe.freeze == "none"
    cached, one_cycle = recipe.cache_features, optimizer.schedule == "one_cycle"
    views_differ = data.augment != "none" or recipe.augment.color_jitter > 0
    jitters = not cached or recipe.feature_views > 0
    batch_norm = model.norm == "batch" or model.backbone != "none"
    settings = (
        ("data.data_dir", None, data.path is None, "without data.path, which is read instead"),
        ("data.num_validation", 0, not images, "for image files, which take data.validation_fraction"),
        ("data.validation_fraction", 0.0, images, "without data.image_size; arrays take data.num_validation"),
        ("data.test_fraction", 0.2, cut, "for arrays, which have a test split of their own"),
        ("data.strict", False, images, "without data.image_size: arrays are always checked"),
        ("data.labels", None, images, "without data.image_size; arrays and tables of features hold their labels"),
        ("data.group", None, images, "without data.image_size"),
        ("data.split_seed", 0, cut or held_out, "without data.num_validation: nothing is held out"),
        ("data.fit", "squash", images, "without data.image_size: arrays have the size that they have"),
        ("data.transposed", False, not images, "for image files, which are taken as they are"),
        ("model.remat", False, trains_backbone and model.is_resnet, "unless a ResNet backbone is trained"),
        ("model.layer_dropout_rate", 0.0, model.head == "progressive", "unless model.head=progressive"),
        ("model.implementation", "auto", model.head == "progressive", "unless model.head=progressive"),
        ("optimizer.nesterov", False, optimizer.name == "sgd" and optimizer.momentum > 0, "unless sgd with momentum"),
        ("optimizer.weight_decay", 0.0, optimizer.name == "adamw", "unless optimizer.name=adamw"),
        ("optimizer.decay_epochs", 7, optimizer.schedule == "step", "unless optimizer.schedule=step"),
        ("optimizer.warmup_fraction", 0.3, one_cycle, "unless optimizer.schedule=one_cycle"),
        ("optimizer.warmup_epochs", 0.0, not one_cycle, "for one_cycle, which takes optimizer.warmup_fraction"),
        ("optimizer.backbone_rate", 1.0, trains_backbone, "unless a backbone is trained"),
        ("augment.min_area", 0.25, data.augment == "resized_crop_flip", "unless data.augment=resized_crop_flip"),
        ("augment.cutmix", 0.0, not cached, "with cache_features: features have no boxes"),
        ("augment.color_jitter", 0.0, jitters, "with cache_features and without feature_views"),
        ("feature_views", 0, views_differ, "without data.augment: all views would be the same"),
        ("batch_norm", "global", batch_norm, "where the model has no batch norm"),
    )
    beneath = [load_recipe(recipe.card.name)] if recipe.card.name in list_recipes() else []
    beneath += [recipe_of_head(recipe)] if cached else []
    for name, default, has_effect, where in settings:
        get = operator.attrgetter(name)
        if not has_effect and all(get(recipe) != get(each) for each in beneath):
            _require(recipe, name, default, where)


def check_settings_for(recipe: Recipe, source: str, example_shape: Sequence[int]) -> None:
    """Like `check_settings`, for data with examples of this shape: features [D] or images [H, W, C].

    Raises:
      UsageError: also if mean or std do not fit the channels.
    """
    data = recipe.data
    if len(example_shape) == 1:
        settings = {"data.augment": "none", "data.transposed": False}
        settings |= {"augment.cutmix": 0.0, "augment.color_jitter": 0.0}
        settings |= {} if data.mean is None else {"data.mean": 0.0}
        settings |= {} if data.std is None else {"data.std": 1.0}
        for name, default in settings.items():
            _require(recipe, name, default, f"for features, which are taken as they are ({source})")
        return
    for name, value in (("mean", data.mean), ("std", data.std)):
        if isinstance(value, tuple) and len(value) != example_shape[-1]:
            raise UsageError(
                f"data.{name} is {value}, expected one number, or one for each of the {example_shape[-1]} channels of "
                f"{source}"
            )


def _require(recipe: Recipe, name: str, default: object, where: str) -> None:
    value = operator.attrgetter(name)(recipe)
    if value != default:
        raise UsageError(f"{name} is {value}, expected {default} {where}")


BEFORE = {"keep_copies_together": False}
"""Settings of the data that older runs had before they recorded them, where that is not today's default."""


def default_settings() -> dict[str, Any]:
    """The settings of runs that do not record them, by dotted name: the defaults, or what `BEFORE` says."""
    blank = dataclasses.asdict(Recipe(Card("", "", ""), DataConfig("")))
    nested = {
        f"{part}.{name}": value
        for part in ("data", "model", "optimizer", "augment")
        for name, value in blank[part].items()
    }
    return blank | nested | {f"data.{name}": value for name, value in BEFORE.items()}
