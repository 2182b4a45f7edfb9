"""Reading a data set that TFDS prepared as array_record, without TensorFlow."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.arrays import Dataset, make_dataset
from pspinal_jax.errors import DataError
from pspinal_jax.log_filter import quiet_absl


def import_tfds() -> Any:
    """The tensorflow_datasets module; DataError where it is not installed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"tensorflow-datasets is not installed ({error}); install it, or give --data.path an .npz file"
        ) from error
    quiet_absl()
    return tfds


def read_prepared(directory: Path, num_classes: int | None) -> Dataset:
    """The data set whose dataset_info.json stands in `directory`, as arrays.

    Raises:
      DataError: if it was not prepared as array_record, has no train and test split of images with labels, or cannot
        be read.
    """
    tfds = import_tfds()
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises many kinds here
        raise DataError(f"{directory} is no data set that TFDS can read: {error}") from error
    return read_builder(builder, num_classes)


def read_builder(builder: Any, num_classes: int | None) -> Dataset:
    """The data set of a prepared TFDS `builder`, as arrays; see `read_prepared`."""
    info = builder.info
    source = f"{info.full_name} in {builder.data_dir}"
    file_format = getattr(info.file_format, "value", info.file_format)
    if file_format != "array_record":
        raise DataError(f"{source} is stored as {file_format}; prepare it again with file_format='array_record'")
    missing = {"train", "test"} - set(info.splits)
    if missing or not {"image", "label"} <= set(info.features):
        raise DataError(f"{source} needs the splits train and test and the features image and label")
    try:
        splits = {name: _read_split(builder, name) for name in ("train", "test")}
    except Exception as error:  # a damaged file surfaces as one of many kinds
        raise DataError(f"{source} cannot be read: {error}; delete it and prepare it again") from error
    label = info.features["label"]
    names = tuple(label.names) if getattr(label, "names", None) else None
    return make_dataset(splits, source, num_classes, names)


def _read_split(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    source = builder.as_data_source(split)
    examples = [source[index] for index in range(len(source))]
    images = np.stack([example["image"] for example in examples])
    return images, np.asarray([example["label"] for example in examples], np.int64)


def prepare(builder: Any) -> None:
    """Prepare `builder` as array_record where it is not yet; safe when several processes do so at once."""
    tfds = import_tfds()
    if builder.is_prepared():
        return
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with _quiet(tfds):
            builder.download_and_prepare(file_format="array_record", download_config=config)
    except OSError as error:
        # Another process finished first: TFDS renames its complete folder into place, and the second rename fails.
        if not builder.is_prepared():
            raise DataError(f"{builder.name} cannot be prepared in {builder.data_dir}: {error}") from error


@contextlib.contextmanager
def _quiet(tfds: Any) -> Any:
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
