"""Cached features: a frozen backbone runs over the data once, and the head trains on its features as on any data.

The features are kept in the run's directory, beside the backbone that completes the head.
"""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.data.dataset import ArraySplit, Dataset, Split, array_dataset
from pspinal_jax.data.npz import read_npz
from pspinal_jax.distributed import barrier, broadcast_from_primary, is_primary, put, whole
from pspinal_jax.environment import convolution_options, jit_with
from pspinal_jax.models import Classifier
from pspinal_jax.progress import progress_bar
from pspinal_jax.recipes.schema import AugmentConfig, Recipe
from pspinal_jax.runs.build import augmentation
from pspinal_jax.runs.directory import RunDirectory, whole_file
from pspinal_jax.training import keys
from pspinal_jax.training.images import process_local_batches
from pspinal_jax.training.sharding import divisible_size, fit_mesh, shard_process_local, shardings
from pspinal_jax.weights.variables import read_variables, save_variables

BACKBONE = "backbone.safetensors"
FEATURES = "features.npz"


def head_recipe(recipe: Recipe) -> Recipe:
    """What is left of `recipe` to train on cached features: the same head, data and schedule, no backbone."""
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(
            recipe.data, image_size=None, resize=None, fit="squash", augment="none", mean=0.0, std=1.0
        ),
        augment=AugmentConfig(mixup=recipe.augment.mixup),
        optimizer=dataclasses.replace(recipe.optimizer, backbone_rate=1.0),
        model=dataclasses.replace(recipe.model, backbone="none", weights=None),
        freeze="none",
        cache_features=False,
        feature_views=0,
    )


def without_backbone(variables: dict[str, Any]) -> dict[str, Any]:
    """The head's part of `variables`."""
    parts = {name: {key: tree[key] for key in tree if key != "backbone"} for name, tree in variables.items()}
    return {name: tree for name, tree in parts.items() if tree}


def add_backbone(directory: RunDirectory, variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of a run's head, completed by its frozen backbone.

    Raises:
      PSpinalError: if the backbone's file is missing or damaged.
    """
    directory.verify(BACKBONE)
    trees = read_variables(directory.path / BACKBONE)
    return {name: {**tree, **({"backbone": trees[name]} if name in trees else {})} for name, tree in variables.items()}


def extract_features(
    recipe: Recipe, model: Classifier, variables: dict[str, Any], data: Dataset[Split], workers: int = 0
) -> Dataset[ArraySplit]:
    """The backbone's features of all of `data`, float32, with its running statistics.

    Args:
      recipe: gives sizes, augmentation and how many augmented passes (`feature_views`) the training split gets; their
        rows follow one another, whole pass by whole pass. 0: one pass without augmentation.
      model: has the backbone.
      variables: its parameters and running statistics.
      data: images.
      workers: processes that decode them; 0 for threads of this one.
    """
    # Never refused: the run may have begun on other devices. Any number divides over itself.
    mesh = fit_mesh(*dataclasses.astuple(recipe.mesh), rows=jax.device_count(), resuming=True)
    placed_variables = put(variables, shardings(mesh, variables))
    augment = augmentation(recipe)

    def plain(variables: Any, images: jax.Array) -> jax.Array:
        features = model.apply(variables, images, False, method="features")
        return features.astype(jnp.float32)  # type: ignore[union-attr]

    def augmented(variables: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        return plain(variables, images if augment is None else augment(key, images))

    jit = partial(jit_with, convolution_options(mesh.devices.flat[0].platform))
    compiled_plain, compiled_augmented = jit(plain), jit(augmented)

    def run(split: Split, description: str, view: int | None = None) -> np.ndarray:
        """Features [N, D] of `split`; augmented with the random numbers of pass `view`."""
        # Random numbers are drawn by the batch, so views have batches of one size on all devices.
        size = divisible_size(mesh, recipe.eval_batch_size) if view is None else recipe.eval_batch_size
        side = recipe.data.side if view is None else recipe.data.train_side
        key = jax.random.fold_in(keys.init_key(recipe.data.split_seed), view or 0)
        order, parts = np.arange(len(split)), []
        local = process_local_batches(mesh, split, order, side, size, workers=workers, pad=True)
        with contextlib.closing(local), progress_bar(len(split), description, "image", is_primary()) as bar:
            for index, ((images, _), count) in enumerate(local):
                placed = shard_process_local(mesh, images, size)
                if view is None:
                    features = compiled_plain(placed_variables, placed)
                else:
                    features = compiled_augmented(placed_variables, placed, jax.random.fold_in(key, index))
                parts.append(whole(features)[:count])
                bar.update(count)
        return np.concatenate(parts)

    views = []
    for view in range(recipe.feature_views):
        split = data.train.random_crop(recipe.data.split_seed, view) if recipe.data.crops else data.train
        views.append(run(split, f"features, view {view + 1}", view))
    train = np.concatenate(views or [run(data.train, "features of train")])
    splits = {"train": ArraySplit(train, np.tile(data.train.labels, max(1, recipe.feature_views)))}
    for name, split in data.splits.items():
        if name != "train":
            splits[name] = ArraySplit(run(split, f"features of {name}"), split.labels)
    return array_dataset(splits, data.class_names, f"features of {data.source}")


def save_features(path: Path, data: Dataset[ArraySplit]) -> None:
    """Write `data` as an .npz that `--data.path` takes, whole or not at all."""
    arrays = {"class_names": np.array(data.class_names)}
    for name, split in data.splits.items():
        arrays |= {f"{name}_images": split.inputs, f"{name}_labels": split.labels}
    with whole_file(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def cached_features(
    recipe: Recipe,
    model: Classifier,
    start: dict[str, Any],
    data: Dataset[Split],
    directory: RunDirectory,
    workers: int,
) -> Dataset[ArraySplit]:
    """The features of `data` in the run's directory, computed unless it holds them.

    Args:
      recipe: has a frozen backbone.
      model: the recipe's.
      start: the variables that the run starts from, see `start_variables`.
      data: images.
      directory: the run's.
      workers: processes that decode them; 0 for threads of this one.
    """
    features, backbone = directory.path / FEATURES, directory.path / BACKBONE
    if not broadcast_from_primary(lambda: features.exists() and backbone.exists()):
        variables = complete_backbone(recipe, model, start, data.example_shape, data.example_dtype)
        found = extract_features(recipe, model, variables, data, workers)
        if is_primary():
            save_variables(backbone, {name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree})
            save_features(features, found)
            directory.record(BACKBONE, FEATURES)
        barrier()
    directory.verify(BACKBONE, FEATURES)
    return read_npz(features, data.num_classes)


def complete_backbone(
    recipe: Recipe, model: Classifier, start: dict[str, Any], input_shape: tuple[int, ...], input_dtype: Any
) -> dict[str, Any]:
    """Variables of the model's backbone: those of `start`, or else drawn by the recipe's seed."""
    if all("backbone" in start.get(name, {}) for name in ("params", "batch_stats")):
        return start
    inputs = jnp.zeros((2, *input_shape), input_dtype)
    drawn = jax.jit(lambda seed: model.init(keys.init_key(seed), inputs, train=False))(recipe.seed)
    return {name: {**tree, **start.get(name, {})} for name, tree in drawn.items()}
