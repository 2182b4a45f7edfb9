"""Finding and reading a data set that TFDS prepared as array_record, without TensorFlow."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.cache import Named, content_stamp, read_through_cache
from pspinal_jax.data.dataset import ArraySplit, Dataset
from pspinal_jax.data.tables import Classes, make_dataset
from pspinal_jax.errors import DataError
from pspinal_jax.files import MOST_JSON_BYTES, expanded, read_bytes, require_file

_FEATURE_CLASSES = frozenset(
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        *("features_dict.FeaturesDict", "image_feature.Image", "labeled_image.LabeledImage"),
        *("class_label_feature.ClassLabel", "tensor_feature.Tensor", "feature.Tensor", "scalar.Scalar"),
        *("text_feature.Text", "bounding_boxes.BBoxFeature", "sequence_feature.Sequence", "dataset_feature.Dataset"),
    )
)
"""What features.json may name: TFDS imports whatever module stands there. Audio and Video are decoded by programs."""

_ARRAYS = {"train_images", "train_labels", "test_images", "test_labels"}
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
STOCK_EMNIST = (
    "TFDS's own emnist cannot be used: its images are transposed, and its letters count 37 classes and hold 88,800 of "
    "the 124,800 training images; prepare ours with: pspinal-jax prepare emnist_letters (or emnist_digits)"
)


def import_tfds() -> Any:
    """The tensorflow_datasets module; DataError where it is not installed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"tensorflow-datasets is not installed ({error}); install it, or give --data.path an .npz file"
        ) from error
    return tfds


def default_data_dir() -> Path:
    """TFDS's own data folder: TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return expanded(import_tfds().core.constants.DATA_DIR)


def find_versions(data_dir: Path, name: str) -> list[Path]:
    """The prepared versions of data set `name` in `data_dir`, oldest first.

    A folder that TFDS was still writing has another kind of name, whatever it holds.
    """
    found = []
    for path in (data_dir / name).glob("*/dataset_info.json"):
        if match := _VERSION.fullmatch(path.parent.name):
            found.append((tuple(map(int, match.groups())), path.parent))
    return [directory for _, directory in sorted(found)]


def find_prepared(data_dir: Path, name: str) -> Path | None:
    """The newest version of data set `name` in `data_dir` that is stored as array_record, or None."""
    readable = [directory for directory in find_versions(data_dir, name) if _is_array_record(directory)]
    return readable[-1] if readable else None


def _is_array_record(directory: Path) -> bool:
    try:
        info = json.loads(read_bytes(directory / "dataset_info.json", MOST_JSON_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(info, dict) and info.get("fileFormat") == "array_record"


def read_prepared(directory: Path, classes: Classes) -> Dataset[ArraySplit]:
    """The data set whose dataset_info.json stands in `directory`, as arrays.

    Raises:
      DataError: if it was not prepared as array_record, has no train and test split of images with labels, cannot be
        read, or is TFDS's own emnist.
    """
    return read_builder(open_prepared(directory), classes)


def open_prepared(directory: Path) -> Any:
    """The TFDS builder of the data set whose dataset_info.json stands in `directory`.

    Raises:
      DataError: if there is none, or it asks for more than TFDS's own features; nothing of it is imported then.
    """
    tfds = import_tfds()
    check_name(directory)
    _check_trust(directory)
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises many kinds here
        raise DataError(f"{directory} is no data set that TFDS can read: {error}") from error


def check_name(directory: Path) -> None:
    """Raise DataError if array_record cannot open files below `directory`: it takes UTF-8 alone."""
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{directory} holds bytes that are not UTF-8, and array_record opens no file there; rename it"
        ) from None


def _check_trust(directory: Path) -> None:
    """Raise DataError unless all in `directory` are files, and features.json names nothing but `_FEATURE_CLASSES`."""
    if not directory.is_dir():
        return  # which TFDS says itself
    path = directory
    try:
        for path in sorted(directory.iterdir()):
            if not path.is_dir():
                require_file(path, MOST_JSON_BYTES if path.suffix == ".json" else None)
        path = directory / "features.json"
        described = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path} cannot be read: {reason}; delete {directory} and prepare the data set again"
        ) from error
    for name in _named_classes(described):
        if name not in _FEATURE_CLASSES:
            raise DataError(
                f"{path} names {name!r:.200}, expected one of TFDS's own features of images, labels, numbers or text: "
                "code that a data set names is never run"
            )


def _named_classes(value: Any) -> Iterator[Any]:
    """All classes named in `value`, as features.json has them since TFDS 4.0: pythonClassName, and once type.

    What stands in a text of JSON within it is looked at too.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(inner, str):
                yield inner
            elif key == "json" and isinstance(inner, str):
                yield from _named_classes(json.loads(inner))
            else:
                yield from _named_classes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named_classes(inner)


def check_format(builder: Any) -> str:
    """What to call the data set of `builder`, which is one that we can read.

    Raises:
      DataError: if it was not prepared as array_record, has no train and test split of images with labels, or is TFDS's
        own emnist.
    """
    info = builder.info
    source = f"{info.full_name} in {builder.data_dir}"
    if info.name == "emnist":
        raise DataError(f"{source}: {STOCK_EMNIST}")
    file_format = getattr(info.file_format, "value", info.file_format)
    if file_format != "array_record":
        raise DataError(f"{source} is stored as {file_format}; prepare it again with file_format='array_record'")
    missing = {"train", "test"} - set(info.splits)
    if missing or not {"image", "label"} <= set(info.features):
        raise DataError(f"{source} needs the splits train and test and the features image and label")
    return source


def read_builder(builder: Any, classes: Classes) -> Dataset[ArraySplit]:
    """The data set of a prepared TFDS `builder`, as arrays; see `read_prepared`."""
    source = check_format(builder)
    directory = Path(builder.data_dir)
    try:
        arrays = read_through_cache(
            directory,
            "arrays",
            content_stamp(directory),
            lambda: _read_arrays(builder),
            lambda known: set(known) >= _ARRAYS,
        )
    except Exception as error:  # a damaged file surfaces as one of many kinds
        raise DataError(f"{source} cannot be read: {error}; delete it and prepare it again") from error
    splits = {name: (arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in ("train", "test")}
    label = builder.info.features["label"]
    names = tuple(label.names) if getattr(label, "names", None) else None
    return make_dataset(splits, source, classes, names)


def _read_arrays(builder: Any) -> Named:
    arrays = {}
    for name in ("train", "test"):
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = _read_split(builder, name)
    return arrays


def _read_split(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    # TFDS would let Pillow open an image of any format, and Pillow hands PostScript to another program.
    tfds = import_tfds()
    encoded = isinstance(builder.info.features["image"], tfds.features.Image)
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()} if encoded else None)
    examples = [source[index] for index in range(len(source))]
    images = np.stack([_decode(example["image"]) if encoded else example["image"] for example in examples])
    return images, np.asarray([example["label"] for example in examples], np.int64)


def _decode(data: bytes) -> np.ndarray:
    from PIL import Image  # `prepare --help` has no need of it

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
