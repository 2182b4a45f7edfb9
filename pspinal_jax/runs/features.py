"""Cached features: a frozen backbone runs over the data once, and the head trains on what it gives."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.data.arrays import Dataset, Split
from pspinal_jax.data.photos.photos import PhotoDataset, Photos
from pspinal_jax.data.progress import progress_bar
from pspinal_jax.models.classifier import Classifier
from pspinal_jax.processes.agree import is_primary
from pspinal_jax.processes.arrays import put, whole
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.directory import whole_file
from pspinal_jax.runs.setup import augmentation
from pspinal_jax.runs.shares import read_share
from pspinal_jax.training import keys
from pspinal_jax.training.mesh import make_mesh, shard_rows
from pspinal_jax.training.partition import shardings


def extract_features(
    recipe: Recipe, model: Classifier, variables: dict[str, Any], data: PhotoDataset, workers: int = 0
) -> Dataset:
    """The backbone's features of all of `data`, float32, with its running statistics.

    Args:
      recipe: gives sizes, augmentation and how many augmented passes (`feature_views`) the training split gets; their
        rows follow one another, whole pass by whole pass. 0: one pass without augmentation.
      model: has the backbone.
      variables: its parameters and running statistics.
      data: photographs.
      workers: processes that decode them; 0 for threads of this one.
    """
    extractor = _Extractor(recipe, model, variables, workers)
    passes = [extractor.run(data.train, f"features, view {view + 1}", view) for view in range(recipe.feature_views)]
    train = np.concatenate(passes) if passes else extractor.run(data.train, "features of train")
    labels = np.tile(data.train.labels, max(1, recipe.feature_views))
    validation = data.validation
    return Dataset(
        train=Split(train, labels),
        test=Split(extractor.run(data.test, "features of test"), data.test.labels),
        validation=None
        if validation is None
        else Split(extractor.run(validation, "features of validation"), validation.labels),
        class_names=data.class_names,
        source=f"features of {data.source}",
    )


class _Extractor:
    def __init__(self, recipe: Recipe, model: Classifier, variables: dict[str, Any], workers: int) -> None:
        self._recipe, self._workers = recipe, workers
        self._mesh = make_mesh(recipe.mesh)
        self._variables = put(variables, shardings(self._mesh, variables))
        augment = augmentation(recipe)

        def plain(variables: Any, images: jax.Array) -> jax.Array:
            features = model.apply(variables, images, False, method="features")
            return features.astype(jnp.float32)  # type: ignore[union-attr]

        def augmented(variables: Any, images: jax.Array, key: jax.Array) -> jax.Array:
            return plain(variables, images if augment is None else augment(key, images))

        self._plain, self._augmented = jax.jit(plain), jax.jit(augmented)

    def run(self, photos: Photos, description: str, view: int | None = None) -> np.ndarray:
        """Features [N, D] of `photos`; augmented with the random numbers of pass `view`."""
        data, size = self._recipe.data, self._recipe.eval_batch_size
        side = data.train_side if view is not None else data.image_size or 0
        key = jax.random.fold_in(keys.init_key(data.split_seed), view or 0)
        parts = []
        with (
            contextlib.closing(
                read_share(
                    self._mesh, photos, np.arange(len(photos)), (side, side), size, workers=self._workers, pad=True
                )
            ) as batches,
            progress_bar(len(photos), description, "image", is_primary()) as bar,
        ):
            for index, ((images, _), count) in enumerate(batches):
                placed = shard_rows(self._mesh, images, size)
                if view is None:
                    features = self._plain(self._variables, placed)
                else:
                    features = self._augmented(self._variables, placed, jax.random.fold_in(key, index))
                parts.append(whole(features)[:count])
                bar.update(count)
        return np.concatenate(parts)


def save_features(path: Path, data: Dataset) -> None:
    """Write `data` as an .npz that `--data.path` takes, whole or not at all."""
    arrays = {"class_names": np.array(data.class_names)}
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        if split is not None:
            arrays |= {f"{name}_images": split.inputs, f"{name}_labels": split.labels}
    with whole_file(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
