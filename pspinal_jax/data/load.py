"""From a recipe's data configuration to arrays, whatever the source."""

# DOC of data/photos/load: """From a photograph recipe's data configuration to its splits."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.data.dataset import Dataset, Split
from pspinal_jax.data.images.folder import read_folder
from pspinal_jax.data.images.images import ImageDataset
from pspinal_jax.data.images.records import read_photo_records
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.prepare import prepare_data_set
from pspinal_jax.data.prepared import STOCK_EMNIST, default_data_dir, find_prepared, find_versions, read_prepared
from pspinal_jax.distributed.coordination import is_primary
from pspinal_jax.errors import DataError
from pspinal_jax.recipes.schema import DataConfig


def load_data(config: DataConfig) -> Dataset | ImageDataset:
    """The data set that `config` names: arrays or, where it has an image_size, photographs; see `load_dataset`.

    Args:
      config: for photographs, `path` is a folder of class folders or a prepared TFDS directory.

    Raises:
      DataError: if it is not there or not readable; the message says what to do.
    """
    if config.image_size is None:
        return load_dataset(config)
    directory = _find_directory(config) if config.path is None else config.path.expanduser()
    return load_photographs(config, directory)


def load_dataset(config: DataConfig) -> Dataset:
    """The data set that `config` names as arrays, as its recipe wants to see it.

    Args:
      config: with `path`, that .npz file or prepared TFDS directory is read. Without, the TFDS data set `name` is
        read from `data_dir`; one that needs no files (digits) is prepared there on first use.

    Raises:
      DataError: if it is not there or not readable, or to be transposed but no square images; the message says what
        to do.
    """
    data = _read(config)
    return _transpose(data) if config.transposed else data


def _transpose(data: Dataset) -> Dataset:
    shape = data.train.inputs.shape
    if len(shape) != 4 or shape[1] != shape[2]:
        raise DataError(
            f"{data.source} holds inputs of shape {list(shape[1:])}; data.transposed takes square images only"
        )
    turned: dict[str, Any] = {
        name: Split(np.ascontiguousarray(split.inputs.swapaxes(1, 2)), split.labels)
        for name in ("train", "validation", "test")
        if (split := getattr(data, name)) is not None
    }
    return dataclasses.replace(data, **turned)


def _read(config: DataConfig) -> Dataset:
    if config.path is not None:
        path = config.path.expanduser()
        return read_prepared(path, config.num_classes) if path.is_dir() else read_npz(path, config.num_classes)
    if config.name.split("/")[0] == "emnist":
        raise DataError(f"{config.name}: {STOCK_EMNIST}")
    known = CATALOGUE.get(config.name)
    if known is not None and not known.files:
        return read_prepared(prepare_data_set(known, config.data_dir).directory, config.num_classes)
    return read_prepared(_find_directory(config), config.num_classes)


def _find_directory(config: DataConfig) -> Path:
    root = default_data_dir() if config.data_dir is None else config.data_dir.expanduser()
    # Where no version is readable, reading the newest says why.
    directory = find_prepared(root, config.name) or next(reversed(find_versions(root, config.name)), None)
    if directory is None:
        raise _not_prepared(config, root)
    return directory


def _not_prepared(config: DataConfig, root: Path) -> DataError:
    folder = "" if config.data_dir is None else f" --data-dir {shlex.quote(str(config.data_dir))}"
    first = f"run: pspinal-jax prepare {config.name}{folder}; or " if config.name in CATALOGUE else ""
    takes = "an .npz file" if config.image_size is None else "a folder of class folders"
    return DataError(
        f"data set {config.name} is not prepared in {root}; {first}give --data.path {takes} or a directory that "
        "TFDS prepared as array_record, or set --data.data-dir"
    )


def load_photographs(config: DataConfig, directory: Path) -> ImageDataset:
    """The photographs in `directory`: prepared by TFDS as array_record, or a folder of class folders.

    Raises:
      DataError: if they cannot be read, or their classes are not as many as `config` says.
    """
    if not directory.is_dir():
        raise DataError(
            f"{directory} is no folder; {config.name} takes a folder of class folders, or the directory of a prepared "
            "data set"
        )
    if (directory / "dataset_info.json").is_file():
        data = read_photo_records(directory)
    else:
        data = read_folder(
            directory,
            test_fraction=config.test_fraction,
            split_seed=config.split_seed,
            strict=config.strict,
            show_progress=is_primary(),
        )
    if config.num_classes not in (None, data.num_classes):
        raise DataError(
            f"{data.source} has {data.num_classes} classes, but data.num_classes is {config.num_classes}; leave "
            "--data.num-classes out"
        )
    return data
