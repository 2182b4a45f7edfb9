"""What `pspinal-jax compare` takes as data, and the features of images, which are computed once and kept."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from pspinal_jax.backbones.efficientnet import SCALES
from pspinal_jax.comparison.ledger import keeps_copies_together
from pspinal_jax.data import load_data
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.data.dataset import ArraySplit, Dataset
from pspinal_jax.data.load import read_file
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.tfds import open_prepared, read_prepared
from pspinal_jax.errors import DataError, RunError, UsageError
from pspinal_jax.files import MOST_JSON_BYTES, expanded, read_bytes, write_json
from pspinal_jax.models import build_model, with_default_preprocessing
from pspinal_jax.recipes import Recipe, load_recipe
from pspinal_jax.recipes.schema import TABLES, DataConfig
from pspinal_jax.runs.features import complete_backbone, extract_features, save_features
from pspinal_jax.runs.restore import start_variables

MOST_PIXELS = 64 * 64 * 3
"""Of images that a head sees as they are; of larger ones it sees a backbone's features."""


def load_features(
    source: str, workdir: Path, backbone: str | None, weights: str | None, seed: int = 0
) -> Dataset[ArraySplit]:
    """The data set that `source` names, as features or small images.

    Args:
      source: an .npz file, a table (.csv, .tsv, .parquet), the directory or the name of a prepared data set, or a
        folder of class folders.
      workdir: where the features of a folder of images are kept.
      backbone: what gives them; None for that of the recipe `folder`.
      weights: its weights; None for that recipe's, 'random' for random numbers.
      seed: cuts the test split of a table, a fifth of each class.

    Raises:
      DataError: if it is not there, or not readable.
      UsageError: if a backbone is named where none is used, or there is no such backbone.
    """
    path = expanded(source)
    if path.is_dir():
        if not (path / "dataset_info.json").is_file() or not _has_small_images(path):
            return _features_of_images(path, workdir, backbone, weights)
        data: Any = read_prepared(path, None)
    elif path.exists() or path.suffix.lower() in (".npz", *TABLES):
        data = read_file(path, None, seed=seed)
    elif source in CATALOGUE:
        data = load_data(DataConfig(name=source))
    else:
        raise DataError(
            f"{source} does not exist; compare takes an .npz file, a table, a folder, the directory of a prepared data "
            f"set, or the name of one: {', '.join(CATALOGUE)}"
        )
    if backbone is not None or weights is not None:
        raise UsageError(f"--backbone and --weights are for folders of images; {source} is taken as it is")
    return data


def _has_small_images(directory: Path) -> bool:
    shape = open_prepared(directory).info.features["image"].shape
    return None not in shape and math.prod(shape) <= MOST_PIXELS


def _features_of_images(folder: Path, workdir: Path, backbone: str | None, weights: str | None) -> Dataset[ArraySplit]:
    recipe = _recipe(folder, backbone, weights)
    images = load_data(dataclasses.replace(recipe.data, keep_copies_together=keeps_copies_together(workdir)))
    identity = {
        "images": images.fingerprint(),
        "backbone": recipe.model.backbone,
        "weights": recipe.model.weights,
        "image_size": recipe.data.image_size,
    }
    path, record = workdir / "features.npz", workdir / "features.json"
    if record.exists() and path.exists():
        try:
            there = json.loads(read_bytes(record, MOST_JSON_BYTES))
        except (OSError, ValueError) as error:
            raise RunError(f"{record} is damaged: {error}; choose another --workdir") from error
        if there != identity:
            raise UsageError(f"{workdir} holds features of other images or another backbone; choose another --workdir")
        return read_npz(path, images.num_classes)
    shape, dtype = images.example_shape, images.example_dtype
    model = build_model(recipe, shape, images.num_classes)
    start = start_variables(recipe, model, None, shape, dtype, images.class_names)
    variables = complete_backbone(recipe, model, start, shape, dtype)
    features = extract_features(recipe, model, variables, images)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        save_features(path, features)
        write_json(record, identity)
    except OSError as error:
        raise RunError(f"{workdir} cannot be written: {error.strerror or error}") from error
    return features


def _recipe(folder: Path, backbone: str | None, weights: str | None) -> Recipe:
    recipe = load_recipe("folder")
    chosen: Any = recipe.model.backbone if backbone is None else backbone
    if chosen not in SCALES:
        raise UsageError(
            f"--backbone is {chosen}, expected one of {', '.join(SCALES)}; compare takes another one's features as the "
            ".npz file that extract-features writes"
        )
    taken = recipe.model.weights if weights is None else None if weights == "random" else weights
    try:
        changed = dataclasses.replace(
            recipe,
            data=dataclasses.replace(recipe.data, path=folder, augment="none", validation_fraction=0.0),
            model=dataclasses.replace(recipe.model, backbone=chosen, weights=taken),
            freeze="backbone",
        )
        return with_default_preprocessing(changed)
    except UsageError as error:
        raise UsageError(f"{error}; --backbone {chosen}, --weights {taken or 'random'}") from error
