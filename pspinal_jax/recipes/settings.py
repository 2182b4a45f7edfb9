"""Settings that could have no effect are refused: nobody shall believe that a run was made with them."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

from pspinal_jax.errors import UsageError
from pspinal_jax.recipes.augment import AugmentConfig
from pspinal_jax.recipes.cached import recipe_of_head
from pspinal_jax.recipes.registry import list_recipes, load_recipe
from pspinal_jax.recipes.schema import DataConfig, ModelConfig, OptimizerConfig, Recipe


def check_settings(recipe: Recipe) -> None:
    """Check that every setting of `recipe` that is not at its default has an effect on a run of it.

    What a shipped recipe sets itself, or the recipe of a head on cached features, is left alone: under
    `--optimizer.name sgd` its weight decay of adamw means nothing, and nobody asked for it.

    Raises:
      UsageError: naming the first that has none, and with what it would have one.
    """
    data, model, optimizer = recipe.data, recipe.model, recipe.optimizer
    images, held_out = data.image_size is not None, data.num_validation > 0
    cut = images or data.is_table
    trained_backbone = model.is_resnet and recipe.freeze == "none"
    trains_backbone = model.backbone != "none" and recipe.freeze == "none"
    cached, one_cycle = recipe.cache_features, optimizer.schedule == "one_cycle"
    beneath = [load_recipe(recipe.card.name)] if recipe.card.name in list_recipes() else []
    beneath += [recipe_of_head(recipe)] if cached else []
    batch_norm = model.norm == "batch" or model.backbone != "none"
    for name, default, has_effect, where in (
        ("data.data_dir", None, data.path is None, "without --data.path, which is read instead"),
        ("data.num_validation", 0, not images, "for image files, which take --data.validation-fraction"),
        ("data.validation_fraction", 0.0, images, "without --data.image-size; arrays take --data.num-validation"),
        ("data.test_fraction", 0.2, cut, "for arrays, which have a test split of their own"),
        ("data.strict", False, images, "without --data.image-size: arrays are always checked"),
        ("data.split_seed", 0, cut or held_out, "without --data.num-validation: nothing is held out"),
        ("data.fit", "squash", images, "without --data.image-size: arrays have the size that they have"),
        ("data.transposed", False, not images, "for image files, which are taken as they are"),
        ("model.remat", False, trained_backbone, "unless a ResNet backbone is trained"),
        ("model.layer_dropout_rate", 0.0, model.head == "progressive", "unless --model.head progressive"),
        ("model.implementation", "auto", model.head == "progressive", "unless --model.head progressive"),
        ("optimizer.nesterov", False, optimizer.name == "sgd" and optimizer.momentum > 0, "unless sgd with momentum"),
        ("optimizer.weight_decay", 0.0, optimizer.name == "adamw", "unless --optimizer.name adamw"),
        ("optimizer.decay_epochs", 7, optimizer.schedule == "step", "unless --optimizer.schedule step"),
        ("optimizer.warmup_fraction", 0.3, one_cycle, "unless --optimizer.schedule one_cycle"),
        ("optimizer.warmup_epochs", 0.0, not one_cycle, "for one_cycle, whose --optimizer.warmup-fraction it is"),
        ("optimizer.backbone_rate", 1.0, trains_backbone, "unless a backbone is trained"),
        ("augment.min_area", 0.25, data.augment == "resized_crop_flip", "unless --data.augment resized_crop_flip"),
        ("augment.cutmix", 0.0, not cached, "with --cache-features: features have no boxes"),
        (
            "augment.color_jitter",
            0.0,
            not cached or recipe.feature_views > 0,
            "with --cache-features: see feature_views",
        ),
        ("feature_views", 0, _augments(recipe), "without --data.augment: all views would be the same"),
        ("batch_norm", "global", batch_norm, "where the model has no batch norm"),
    ):
        get = operator.attrgetter(name)
        if all(get(recipe) != get(each) for each in beneath):
            _check(recipe, name, default, has_effect, where)


def check_settings_for(recipe: Recipe, source: str, example_shape: Sequence[int]) -> None:
    """As `check_settings`, for data whose examples have this shape: features [D], or images [H, W, C].

    Raises:
      UsageError: also if mean or std do not fit the channels.
    """
    if len(example_shape) == 1:
        where = f"for features, which are taken as they are ({source})"
        settings = (("augment", "none"), ("mean", 0.0), ("std", 1.0), ("transposed", False))
        for name, default in settings:
            if getattr(recipe.data, name) is not None:
                _check(recipe, f"data.{name}", default, False, where)
        for name in ("cutmix", "color_jitter"):
            _check(recipe, f"augment.{name}", 0.0, False, where)
        return
    for name in ("mean", "std"):
        value = getattr(recipe.data, name)
        if isinstance(value, tuple) and len(value) != example_shape[-1]:
            raise UsageError(
                f"data.{name} is {value}, expected one number, or one for each of the {example_shape[-1]} channels of "
                f"{source}"
            )


BEFORE = {"keep_copies_together": False}
"""Settings of the data that runs were made with before they recorded them, where that is not today's default."""


def default_settings() -> dict[str, Any]:
    """What runs were made with that do not record a setting, by dotted name: its default, or what `BEFORE` says."""
    parts: dict[str, type] = {"": Recipe, "data.": DataConfig, "model.": ModelConfig}
    parts |= {"optimizer.": OptimizerConfig, "augment.": AugmentConfig}
    defaults = {
        prefix + field.name: field.default
        for prefix, part in parts.items()
        for field in dataclasses.fields(part)
        if field.default is not dataclasses.MISSING and not dataclasses.is_dataclass(field.default)
    }
    return defaults | {f"data.{name}": value for name, value in BEFORE.items()}


def _augments(recipe: Recipe) -> bool:
    """Whether images of two passes over the training data differ."""
    return recipe.data.augment != "none" or recipe.augment.color_jitter > 0


def _check(recipe: Recipe, name: str, default: object, has_effect: bool, where: str) -> None:
    value = operator.attrgetter(name)(recipe)
    if value != default and not has_effect:
        raise UsageError(f"{name} is {value}, expected {default} {where}")
