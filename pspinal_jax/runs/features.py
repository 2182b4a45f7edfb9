"""A run on cached features: its head trains on what a frozen backbone, which runs over the data once, gives.

The features are made when the run starts. They are kept in its directory, beside the backbone that completes the head.
"""

import contextlib
import dataclasses
from collections.abc import Callable
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
from pspinal_jax.errors import DataError, RunError
from pspinal_jax.models import Classifier
from pspinal_jax.progress import progress_bar
from pspinal_jax.recipes.schema import AugmentConfig, Recipe
from pspinal_jax.runs import manifest
from pspinal_jax.runs.directory import RunDirectory, whole_file
from pspinal_jax.runs.programs import augmentation
from pspinal_jax.training import keys
from pspinal_jax.training.examples import process_local_batches
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


def head_of(start: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The head's part of the variables that `start` gives."""
    parts = {name: {key: tree[key] for key in tree if key != "backbone"} for name, tree in start().items()}
    return {name: tree for name, tree in parts.items() if tree}


def save_backbone(path: Path, variables: dict[str, Any]) -> None:
    """Write the backbone's part of `variables`, whole or not at all."""
    save_variables(path, {name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree})


def add_backbone(directory: Path, variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of a run's head, completed by its frozen backbone.

    Raises:
      RunError: if the backbone's file is missing or damaged.
    """
    path = directory / BACKBONE
    manifest.check(directory, BACKBONE)
    try:
        trees = read_variables(path)
    except DataError as error:
        raise RunError(f"the run's frozen backbone: {error}; train again") from error
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
    extractor = _Extractor(recipe, model, variables, workers)
    passes = [
        extractor.run(_moved(recipe, data.train, view), f"features, view {view + 1}", view)
        for view in range(recipe.feature_views)
    ]
    train = np.concatenate(passes) if passes else extractor.run(data.train, "features of train")
    splits = {"train": ArraySplit(train, np.tile(data.train.labels, max(1, recipe.feature_views)))}
    for name, split in data.splits.items():
        if name != "train":
            splits[name] = ArraySplit(extractor.run(split, f"features of {name}"), split.labels)
    return array_dataset(splits, data.class_names, f"features of {data.source}")


def _moved(recipe: Recipe, split: Split, view: int) -> Split:
    return split.random_crop(recipe.data.split_seed, view) if recipe.data.crops else split


class _Extractor:
    def __init__(self, recipe: Recipe, model: Classifier, variables: dict[str, Any], workers: int) -> None:
        self._recipe, self._workers = recipe, workers
        # Never refused: the run may have begun on other devices. Any number divides over itself.
        self._mesh = fit_mesh(*dataclasses.astuple(recipe.mesh), rows=jax.device_count(), resuming=True)
        self._variables = put(variables, shardings(self._mesh, variables))
        augment = augmentation(recipe)

        def plain(variables: Any, images: jax.Array) -> jax.Array:
            features = model.apply(variables, images, False, method="features")
            return features.astype(jnp.float32)  # type: ignore[union-attr]

        def augmented(variables: Any, images: jax.Array, key: jax.Array) -> jax.Array:
            return plain(variables, images if augment is None else augment(key, images))

        jit = partial(jit_with, convolution_options(self._mesh.devices.flat[0].platform))
        self._plain, self._augmented = jit(plain), jit(augmented)

    def run(self, split: Split, description: str, view: int | None = None) -> np.ndarray:
        """Features [N, D] of `split`; augmented with the random numbers of pass `view`."""
        data, size = self._recipe.data, self._recipe.eval_batch_size
        if view is None:  # random numbers are drawn by the batch, so views have batches of one size on all devices
            size = divisible_size(self._mesh, size)
        side = data.train_side if view is not None else data.side
        key = jax.random.fold_in(keys.init_key(data.split_seed), view or 0)
        parts = []
        with (
            contextlib.closing(
                process_local_batches(
                    self._mesh, split, np.arange(len(split)), (side, side), size, workers=self._workers, pad=True
                )
            ) as batches,
            progress_bar(len(split), description, "image", is_primary()) as bar,
        ):
            for index, ((images, _), count) in enumerate(batches):
                placed = shard_process_local(self._mesh, images, size)
                if view is None:
                    features = self._plain(self._variables, placed)
                else:
                    features = self._augmented(self._variables, placed, jax.random.fold_in(key, index))
                parts.append(whole(features)[:count])
                bar.update(count)
        return np.concatenate(parts)


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
    start: Callable[[], dict[str, Any]],
    data: Dataset[Split],
    directory: RunDirectory,
    workers: int,
) -> Dataset[ArraySplit]:
    """The features of `data` in the run's directory, computed unless they are there already.

    Args:
      recipe: has a frozen backbone.
      model: the recipe's.
      start: gives the variables that the run starts from, see `start_variables`.
      data: images.
      directory: the run's.
      workers: processes that decode them; 0 for threads of this one.
    """
    path = directory.path / FEATURES
    if not broadcast_from_primary(lambda: path.exists() and (directory.path / BACKBONE).exists()):
        variables = complete_backbone(recipe, model, start(), data.example_shape, data.example_dtype)
        features = extract_features(recipe, model, variables, data, workers)
        if is_primary():
            save_backbone(directory.path / BACKBONE, variables)
            save_features(path, features)
            manifest.record(directory.path, BACKBONE, FEATURES)
        barrier()
    manifest.check(directory.path, BACKBONE, FEATURES)
    return read_npz(path, data.num_classes)


def complete_backbone(
    recipe: Recipe, model: Classifier, start: dict[str, Any], input_shape: tuple[int, ...], input_dtype: Any
) -> dict[str, Any]:
    """Variables of the model's backbone: those of `start`, or else drawn by the recipe's seed."""
    if all("backbone" in start.get(name, {}) for name in ("params", "batch_stats")):
        return start
    inputs = jnp.zeros((2, *input_shape), input_dtype)
    drawn = jax.jit(lambda seed: model.init(keys.init_key(seed), inputs, train=False))(recipe.seed)
    return {name: {**tree, **start.get(name, {})} for name, tree in drawn.items()}
