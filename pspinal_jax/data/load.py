"""From a recipe's data configuration to its data set: arrays, or images if it has an image_size."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.data.dataset import ArraySplit, Dataset, Split
from pspinal_jax.data.folder import read_folder
from pspinal_jax.data.images import ImageSplit
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.prepare import prepare_data_set
from pspinal_jax.data.tables import Classes, read_table
from pspinal_jax.data.tfds import (
    STOCK_EMNIST,
    default_data_dir,
    find_prepared,
    read_image_records,
    read_prepared,
)
from pspinal_jax.distributed import is_primary
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.files import expanded
from pspinal_jax.recipes.schema import TABLES, DataConfig


def load_data(config: DataConfig, class_names: Sequence[str] | None = None, needs_test: bool = True) -> Dataset[Split]:
    """Load the data set that `config` names.

    Args:
      config: data configuration. With `path`, the .npz file, table, prepared TFDS directory or, for images, folder of
        class folders is read. Otherwise the TFDS data set `name` is read from `data_dir`; data that needs no files
        (digits) is prepared there on first use.
      class_names: class names of a run, to which the labels of arrays refer; None for those of the data.
      needs_test: whether a folder or a table with too few examples for a test split is an error.

    Raises:
      DataError: if the data does not exist or cannot be read, or is to be transposed but not square; the message says
        what to do.
    """
    if config.image_size is not None:
        return _load_images(config, config.side, needs_test)
    data = _load_arrays(config, config.num_classes if class_names is None else class_names, needs_test)
    if not config.transposed:
        return data
    if len(data.example_shape) != 3 or data.example_shape[0] != data.example_shape[1]:
        raise DataError(
            f"{data.source} holds inputs of shape {data.example_shape}; data.transposed takes square images"
        )
    return data.map_splits(lambda split: ArraySplit(np.ascontiguousarray(split.inputs.swapaxes(1, 2)), split.labels))


def read_file(
    path: Path, classes: Classes, test_fraction: float = 0.2, seed: int = 0, needs_test: bool = True
) -> Dataset[ArraySplit]:
    """Load an .npz file or a table, without splitting off a test split; raises like `load_data`."""
    if path.suffix.lower() in TABLES:
        return read_table(path, classes, test_fraction, seed, needs_test)
    return read_npz(path, classes)


def _load_arrays(config: DataConfig, classes: Classes, needs_test: bool) -> Dataset[ArraySplit]:
    if config.path is not None:
        path = expanded(config.path)
        if path.is_dir():
            return read_prepared(path, classes)
        return read_file(path, classes, config.test_fraction, config.split_seed, needs_test)
    if config.name.split("/")[0] == "emnist":
        raise DataError(f"{config.name}: {STOCK_EMNIST}")
    known = CATALOGUE.get(config.name)
    if known is not None and not known.files:
        return read_prepared(prepare_data_set(known, config.data_dir).directory, classes)
    return read_prepared(_find_directory(config), classes)


def _load_images(config: DataConfig, image_size: int, needs_test: bool) -> Dataset[ImageSplit]:
    labels = None if config.labels is None else expanded(config.labels)
    if config.path is not None:
        directory = expanded(config.path)
    else:
        directory = _find_directory(config) if labels is None else labels.parent
    if not directory.is_dir():
        raise DataError(f"{directory} is not a folder; give one of class folders, or of a prepared data set")
    if (directory / "dataset_info.json").is_file():
        if config.labels is not None or config.group is not None:
            raise UsageError(
                f"{directory} is a prepared data set, whose labels and splits are its own; data.labels and "
                "data.group are for folders"
            )
        data = read_image_records(directory, image_size)
    else:
        data = read_folder(
            directory,
            image_size=image_size,
            test_fraction=config.test_fraction,
            split_seed=config.split_seed,
            strict=config.strict,
            labels=labels,
            group=config.group,
            keep_copies_together=config.keep_copies_together,
            needs_test=needs_test,
            show_progress=is_primary(),
        )
    if config.num_classes not in (None, data.num_classes):
        raise DataError(f"{data.source} has {data.num_classes} classes, but data.num_classes is {config.num_classes}")
    return data.map_splits(lambda split: dataclasses.replace(split, resize_mode=config.fit))


def _find_directory(config: DataConfig) -> Path:
    root = default_data_dir() if config.data_dir is None else expanded(config.data_dir)
    directory = find_prepared(root, config.name, any_format=True)  # reading another format says what is wrong
    if directory is not None:
        return directory
    folder = "" if config.data_dir is None else f" --data-dir {shlex.quote(str(config.data_dir))}"
    first = f"run: pspinal-jax prepare {config.name}{folder}; or " if config.name in CATALOGUE else ""
    takes = "an .npz or .csv file" if config.image_size is None else "a folder of class folders"
    raise DataError(
        f"data set {config.name} is not prepared in {root}; {first}give --data.path {takes} or a directory that "
        "TFDS prepared as array_record, or set --data.data-dir"
    )
