"""From a photograph recipe's data configuration to its splits."""

from pathlib import Path

from pspinal_jax.data.photos.folder import read_folder
from pspinal_jax.data.photos.photos import PhotoDataset
from pspinal_jax.data.photos.records import read_photo_records
from pspinal_jax.errors import DataError
from pspinal_jax.processes.agree import is_primary
from pspinal_jax.recipes.schema import DataConfig


def load_photographs(config: DataConfig, directory: Path) -> PhotoDataset:
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
