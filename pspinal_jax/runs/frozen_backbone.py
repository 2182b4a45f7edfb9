"""A run on cached features trains a head alone; beside its checkpoints lies the frozen backbone that completes it."""

import dataclasses
from pathlib import Path
from typing import Any

from pspinal_jax.errors import DataError, RunError
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.weights.variables import read_variables, save_variables

BACKBONE = "backbone.safetensors"


def head_recipe(recipe: Recipe) -> Recipe:
    """What is left of `recipe` to train on cached features: the same head, data and schedule, no backbone."""
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, image_size=None, resize=None, augment="none", mean=0.0, std=1.0),
        model=dataclasses.replace(recipe.model, backbone="none", weights=None),
        freeze="none",
        cache_features=False,
        feature_views=0,
    )


def save_backbone(path: Path, variables: dict[str, Any]) -> None:
    """Write the backbone's part of `variables`, whole or not at all."""
    save_variables(path, {name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree})


def add_backbone(directory: Path, variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of a run's head, completed by its frozen backbone.

    Raises:
      RunError: if the backbone's file is missing or damaged.
    """
    path = directory / BACKBONE
    try:
        trees = read_variables(path)
    except DataError as error:
        raise RunError(f"the run's frozen backbone: {error}; train again") from error
    return {name: {**tree, **({"backbone": trees[name]} if name in trees else {})} for name, tree in variables.items()}
