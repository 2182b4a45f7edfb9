"""Runs on cached features: the features are made once, when the run starts, and kept in its directory."""

from typing import Any

import jax
import jax.numpy as jnp

from pspinal_jax.data.arrays import Dataset
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.photos.photos import PhotoDataset
from pspinal_jax.models.build import build_model
from pspinal_jax.models.classifier import Classifier
from pspinal_jax.processes.agree import barrier, from_primary, is_primary
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.features import extract_features, save_features
from pspinal_jax.runs.frozen_backbone import BACKBONE, save_backbone
from pspinal_jax.runs.setup import input_of
from pspinal_jax.training import keys

FEATURES = "features.npz"


def cached_features(
    recipe: Recipe, start: dict[str, Any], data: PhotoDataset, directory: RunDirectory, workers: int
) -> Dataset:
    """The features of `data` in the run's directory, computed unless they are there already.

    Args:
      recipe: has a frozen backbone.
      start: the variables that the run starts from, see `start_variables`.
      data: photographs.
      directory: the run's.
      workers: processes that decode them; 0 for threads of this one.
    """
    path = directory.path / FEATURES
    if not from_primary(path.exists):
        model, variables = make_backbone(recipe, start, data)
        features = extract_features(recipe, model, variables, data, workers)
        if is_primary():
            save_backbone(directory.path / BACKBONE, variables)
            save_features(path, features)
        barrier()
    return read_npz(path, data.num_classes)


def make_backbone(recipe: Recipe, start: dict[str, Any], data: PhotoDataset) -> tuple[Classifier, dict[str, Any]]:
    """The model of `recipe`, and variables of its backbone: those of `start`, or else drawn by the recipe's seed."""
    shape, dtype = input_of(recipe, data)
    model = build_model(recipe, shape, data.num_classes)
    if all("backbone" in start.get(name, {}) for name in ("params", "batch_stats")):
        return model, start
    init = jax.jit(lambda seed: model.init(keys.init_key(seed), jnp.zeros((2, *shape), dtype), train=False))
    return model, {name: {**tree, **start.get(name, {})} for name, tree in init(recipe.seed).items()}
