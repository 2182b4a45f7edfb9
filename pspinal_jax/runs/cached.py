"""Runs on cached features: the features are made once, when the run starts, and kept in its directory."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pspinal_jax.data.arrays import Dataset
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.photos.photos import PhotoDataset
from pspinal_jax.models.build import build_model
from pspinal_jax.models.classifier import Classifier
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.features import extract_features, save_features
from pspinal_jax.runs.frozen_backbone import BACKBONE, save_backbone
from pspinal_jax.runs.options import RunOptions
from pspinal_jax.runs.setup import input_of
from pspinal_jax.runs.start import start_variables
from pspinal_jax.training import keys

FEATURES = "features.npz"


def cached_features(recipe: Recipe, options: RunOptions, data: PhotoDataset, directory: RunDirectory) -> Dataset:
    """The features of `data` in the run's directory, computed unless they are there already."""
    path = directory.path / FEATURES
    if not path.exists():
        model, variables = make_backbone(recipe, options.init_from, data)
        save_backbone(directory.path / BACKBONE, variables)
        save_features(path, extract_features(recipe, model, variables, data, options.workers))
    return read_npz(path, data.num_classes)


def make_backbone(recipe: Recipe, init_from: Path | None, data: PhotoDataset) -> tuple[Classifier, dict[str, Any]]:
    """The model of `recipe`, and the variables that it starts from with the recipe's seed."""
    shape, dtype = input_of(recipe, data)
    model = build_model(recipe, shape, data.num_classes)
    inputs = jax.ShapeDtypeStruct((2, *shape), dtype)
    start = start_variables(recipe, init_from, model, inputs)
    init = jax.jit(lambda seed: model.init(keys.init_key(seed), jnp.zeros(inputs.shape, dtype), train=False))
    variables = init(recipe.seed)
    return model, {name: {**tree, **start.get(name, {})} for name, tree in variables.items()}
