"""Data sets that TFDS prepared as array_record: found and read, without TensorFlow, as arrays or as encoded images.

What takes long to read is kept in a stamped .npz beside the directory: 70,000 PNG records cost ten seconds every time.
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.dataset import ArraySplit, Dataset, check_labels, digest_bytes
from pspinal_jax.data.images import Encoded, ImageSplit
from pspinal_jax.data.tables import Classes, make_dataset
from pspinal_jax.errors import DataError
from pspinal_jax.files import MAX_JSON_BYTES, atomic_file, expanded, read_bytes, require_file

_FEATURE = re.compile(r"tensorflow_datasets\.core\.features\.(?!audio|video)\w+\.\w+")
"""What features.json may name: TFDS imports whatever module stands there. Audio and Video are decoded by programs."""

STOCK_EMNIST = (
    "TFDS's own emnist cannot be used: its images are transposed, and its letters count 37 classes and hold 88,800 of "
    "the 124,800 training images; prepare ours with: pspinal-jax prepare emnist_letters (or emnist_digits)"
)
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_VALIDATION = ("validation", "valid", "val")
_STAMP = "stamp"
_OPENING = threading.Lock()
_Arrays = dict[str, np.ndarray]


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


def find_prepared(data_dir: Path, name: str, any_format: bool = False) -> Path | None:
    """The newest version of data set `name` in `data_dir` that is stored as array_record, or None.

    With `any_format`, the newest of another format where there is none. A folder that TFDS was still writing has
    another kind of name, whatever it holds.
    """
    found = [path.parent for path in (data_dir / name).glob("*/dataset_info.json")]
    versions = [directory for directory in found if _VERSION.fullmatch(directory.name)]
    versions.sort(key=lambda directory: tuple(map(int, directory.name.split("."))), reverse=True)
    return next(iter([*filter(_is_array_record, versions), *(versions if any_format else ())]), None)


def _is_array_record(directory: Path) -> bool:
    try:
        info = json.loads(read_bytes(directory / "dataset_info.json", MAX_JSON_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(info, dict) and info.get("fileFormat") == "array_record"


def read_prepared(directory: Path, classes: Classes) -> Dataset[ArraySplit]:
    """The data set whose dataset_info.json stands in `directory`, as arrays.

    Raises:
      DataError: if it was not prepared as array_record, has no train and test split of images with labels, cannot be
        read, or is TFDS's own emnist.
    """
    builder = open_prepared(directory)
    source = _check_format(builder)
    names = [f"{split}_{kind}" for split in ("train", "test") for kind in ("images", "labels")]
    stamp = _stamp(directory, [file for split in ("train", "test") for file in builder.info.splits[split].filenames])
    try:
        arrays = _read_through_cache(directory, "arrays", stamp, names, lambda: _read_arrays(builder))
    except Exception as error:  # a damaged file surfaces as one of many kinds
        raise _unreadable(directory, error) from error
    splits = {name: (arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in ("train", "test")}
    return make_dataset(splits, source, classes, _class_names(builder))


def read_image_records(directory: Path, image_size: int) -> Dataset[ImageSplit]:
    """The images whose dataset_info.json stands in `directory`; they stay encoded.

    Args:
      directory: a prepared data set.
      image_size: side in pixels of a model's input.

    Raises:
      DataError: as `read_prepared`.
    """
    directory = expanded(directory)
    builder = open_prepared(directory)
    source = _check_format(builder)
    validation = [{"validation": name} for name in _VALIDATION if name in builder.info.splits][:1]
    names_of = {"train": "train", "test": "test", **(validation[0] if validation else {})}
    splits = {kind: _read_image_split(builder, directory, split) for kind, split in names_of.items()}
    label = builder.info.features["label"]
    num_classes = getattr(label, "num_classes", None) or 1 + max(int(split.labels.max()) for split in splits.values())
    for kind, split in splits.items():
        check_labels(f"{source}: {kind}", split.labels, num_classes)
    names = _class_names(builder) or tuple(map(str, range(num_classes)))
    return Dataset(splits, names, source, (image_size, image_size, 3))


def open_prepared(directory: Path) -> Any:
    """The TFDS builder of the data set whose dataset_info.json stands in `directory`.

    Raises:
      DataError: if there is none, or it asks for more than TFDS's own features; nothing of it is imported then.
    """
    tfds = import_tfds()
    check_name(directory)
    if directory.is_dir():
        _check_trust(directory)
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises many kinds here
        raise DataError(f"{directory} is not a data set that TFDS can read: {error}") from error


def check_name(directory: Path) -> None:
    """Raise DataError if array_record cannot open files below `directory`: it takes UTF-8 alone."""
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{directory} holds bytes that are not UTF-8, and array_record opens no file there; rename it"
        ) from None


def _check_trust(directory: Path) -> None:
    """Raise DataError unless all in `directory` are files, and features.json names nothing but TFDS's own features."""

    def check(node: dict[str, Any]) -> dict[str, Any]:
        # features.json has the classes as pythonClassName since TFDS 4.0, and as type before; JSON may lie within JSON.
        for key in ("pythonClassName", "python_class_name", "type"):
            if isinstance(node.get(key), str) and not _FEATURE.fullmatch(node[key]):
                raise DataError(
                    f"{path} names {node[key]!r:.200}, expected one of TFDS's own features of images, labels, numbers "
                    "or text: code that a data set names is never run"
                )
        if isinstance(node.get("json"), str):
            json.loads(node["json"], object_hook=check)
        return node

    path = directory
    try:
        for path in sorted(directory.iterdir()):
            if not path.is_dir():
                require_file(path, MAX_JSON_BYTES if path.suffix == ".json" else None)
        path = directory / "features.json"
        if path.exists():
            json.loads(path.read_bytes(), object_hook=check)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _check_format(builder: Any) -> str:
    """The name of the data set of `builder` in messages; DataError if it is not one that we can read."""
    info = builder.info
    source = f"{info.full_name} in {builder.data_dir}"
    if info.name == "emnist":
        raise DataError(f"{source}: {STOCK_EMNIST}")
    file_format = getattr(info.file_format, "value", info.file_format)
    if file_format != "array_record":
        raise DataError(f"{source} is stored as {file_format}; prepare it again with file_format='array_record'")
    if not {"train", "test"} <= set(info.splits) or not {"image", "label"} <= set(info.features):
        raise DataError(f"{source} needs the splits train and test and the features image and label")
    return source


def _class_names(builder: Any) -> tuple[str, ...] | None:
    names = getattr(builder.info.features["label"], "names", None)
    return tuple(names) if names else None


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return DataError(f"{path} cannot be read: {reason}; delete the data set and prepare it again")


def _open_split(builder: Any, split: str) -> Any:
    # TFDS would let Pillow open an image of any format, and Pillow hands PostScript to another program.
    tfds = import_tfds()
    encoded = isinstance(builder.info.features["image"], tfds.features.Image)
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()} if encoded else None)


def _read_arrays(builder: Any) -> _Arrays:
    arrays = {}
    for name in ("train", "test"):
        source = _open_split(builder, name)
        examples = [source[index] for index in range(len(source))]
        arrays[f"{name}_images"] = np.stack([_decode(example["image"]) for example in examples])
        arrays[f"{name}_labels"] = np.asarray([example["label"] for example in examples], np.int64)
    return arrays


def _decode(image: bytes | np.ndarray) -> np.ndarray:
    from PIL import Image  # `prepare --help` has no need of it

    if isinstance(image, np.ndarray):
        return image
    with Image.open(io.BytesIO(image), formats=("PNG", "JPEG")) as opened:
        pixels = np.asarray(opened)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _read_image_split(builder: Any, directory: Path, split: str) -> ImageSplit:
    info = builder.info.splits[split]
    records = Records(directory, split, info.num_examples)
    if not len(records):
        raise DataError(f"{directory} has no example in its split {split}; delete it and prepare the data set again")
    stamp, names = _stamp(directory, info.filenames), ["labels", "digests", "crc"]
    known = _read_through_cache(directory, f"{split}.labels", stamp, names, lambda: _read_labels(records))
    records = dataclasses.replace(records, crc=int(known["crc"]), known_digests=known["digests"])
    return ImageSplit(records, known["labels"])


def _read_labels(records: "Records") -> _Arrays:
    labels, digests, crc = np.zeros(len(records), np.int32), np.zeros(len(records), np.uint64), 0
    for index in range(len(records)):
        example = records.example(index)
        labels[index], digests[index] = example["label"], digest_bytes(example["image"])
        crc = zlib.crc32(example["image"], crc)
    return {"labels": labels, "digests": digests, "crc": np.array(crc)}


@dataclasses.dataclass(frozen=True, eq=False)
class Records(Encoded):
    """The encoded images of one split of a prepared directory; its files are opened when the first is read.

    Attributes:
      directory: the prepared data set.
      split: TFDS's name of the split.
      length: N.
      crc: the checksum of all images.
      known_digests: uint64 [N].
    """

    directory: Path
    split: str
    length: int
    crc: int = 0
    known_digests: np.ndarray | None = None

    @functools.cached_property
    def _source(self) -> Any:
        return _open_split(open_prepared(self.directory), self.split)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_source"}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> bytes:
        return bytes(self.example(index)["image"])

    def example(self, index: int) -> dict[str, Any]:
        """Example number `index`, its image encoded.

        Raises:
          DataError: if it cannot be read.
        """
        try:
            with _OPENING:
                source = self._source
            example: dict[str, Any] = source[index]
        except DataError:
            raise
        except Exception as error:  # a damaged file surfaces as one of many kinds
            raise _unreadable(self.directory, error) from error
        return example

    def name(self, index: int) -> str:
        """Split and number."""
        return f"{self.split}[{index}] of {self.directory}"

    def fingerprint(self) -> int:
        """The checksum of the images."""
        return self.crc

    def digests(self) -> np.ndarray:
        """See `Encoded`."""
        return super().digests() if self.known_digests is None else self.known_digests


def _stamp(directory: Path, files: Iterable[str]) -> str:
    """A text that changes when the files are written again."""
    try:
        found = [(name, (directory / name).stat()) for name in sorted(files)]
    except OSError as error:
        raise _unreadable(directory, error) from error
    return str(zlib.crc32(repr([(name, status.st_size, status.st_mtime_ns) for name, status in found]).encode()))


def _read_through_cache(
    directory: Path, kind: str, stamp: str, names: Iterable[str], read: Callable[[], _Arrays]
) -> _Arrays:
    """The arrays `names` that `read` makes of `directory`, from the cache .VERSION.KIND.npz beside it if it fits."""
    path = directory.with_name(f".{directory.name}.{kind}.npz")
    try:
        with path.open("rb") as file, np.load(file) as archive:  # never unpickles, and zip checks every array's CRC
            if str(archive[_STAMP]) == stamp:
                return {name: archive[name] for name in names}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        pass
    arrays = read()
    # A folder that cannot be written or is full only costs the next reader time.
    with contextlib.suppress(OSError), atomic_file(path) as part, part.open("wb") as target:
        np.savez(target, **{_STAMP: np.array(stamp)}, **arrays)  # type: ignore[arg-type]
    return arrays
