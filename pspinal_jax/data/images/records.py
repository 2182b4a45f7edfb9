"""Photographs that TFDS prepared as array_record, read as the encoded bytes that they were stored as."""

import contextlib
import os
import threading
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.images.images import ImageDataset, ImageSplit
from pspinal_jax.data.prepared import check_format, import_tfds, open_prepared
from pspinal_jax.errors import DataError

_VALIDATION = ("validation", "valid", "val")


class Records:
    """The encoded pictures of one split of a prepared directory; the files are opened when the first is read."""

    def __init__(self, directory: Path, split: str, length: int, crc: int = 0) -> None:
        self.directory, self.split, self.length, self.crc = directory, split, length, crc
        self._source: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[Path, str, int, int]:
        return self.directory, self.split, self.length, self.crc

    def __setstate__(self, state: tuple[Path, str, int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

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
            with self._lock:
                if self._source is None:
                    self._source = _open_split(self.directory, self.split)
            example: dict[str, Any] = self._source[index]
        except DataError:
            raise
        except Exception as error:  # a damaged file surfaces as one of many kinds
            reason = " ".join(str(error).split())
            raise DataError(
                f"{self.directory} cannot be read: {reason}; delete it and prepare the data set again"
            ) from error
        return example

    def name(self, index: int) -> str:
        """Split and number."""
        return f"{self.split}[{index}] of {self.directory}"

    def fingerprint(self) -> int:
        """The checksum of the pictures."""
        return self.crc


def read_photo_records(directory: Path) -> ImageDataset:
    """The photographs whose dataset_info.json stands in `directory`; pictures stay encoded.

    The labels are read once, which takes as long as reading all the files, and kept beside the directory.

    Raises:
      DataError: if it was not prepared as array_record, has no train and test split of images with labels, or cannot be
        read.
    """
    directory = directory.expanduser()
    builder = open_prepared(directory)
    source = check_format(builder)
    splits = {"train": "train", "test": "test"}
    own = [name for name in _VALIDATION if name in builder.info.splits]
    if own:
        splits["validation"] = own[0]
    photos = {kind: _read_split(builder, directory, split) for kind, split in splits.items()}
    feature = builder.info.features["label"]
    num_classes = getattr(feature, "num_classes", None) or 1 + max(int(split.labels.max()) for split in photos.values())
    for kind, split in photos.items():
        if split.labels.min() < 0 or split.labels.max() >= num_classes:
            raise DataError(
                f"{source}: {kind} has labels from {split.labels.min()} to {split.labels.max()}, expected "
                f"0 .. {num_classes - 1}"
            )
    names = tuple(feature.names) if getattr(feature, "names", None) else tuple(map(str, range(num_classes)))
    return ImageDataset(photos["train"], photos.get("validation"), photos["test"], names, source)


def _open_split(directory: Path, split: str) -> Any:
    tfds = import_tfds()
    return open_prepared(directory).as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def _read_split(builder: Any, directory: Path, split: str) -> ImageSplit:
    info = builder.info.splits[split]
    count = info.num_examples
    if not count:
        raise DataError(f"{directory} has no example in its split {split}; delete it and prepare the data set again")
    stamp = _stamp(directory, info.filenames)
    place = directory.with_name(f".{directory.name}.{split}.labels.npz")
    labels, crc = _load(place, stamp, count) or (None, 0)
    if labels is None:
        labels, crc = _read_labels(Records(directory, split, count))
        _store(place, stamp, labels, crc)
    return ImageSplit(Records(directory, split, count, crc), labels)


def _read_labels(records: Records) -> tuple[np.ndarray, int]:
    labels, crc = np.zeros(len(records), np.int32), 0
    for index in range(len(records)):
        example = records.example(index)
        labels[index] = example["label"]
        crc = zlib.crc32(example["image"], crc)
    return labels, crc


def _stamp(directory: Path, files: Iterable[str]) -> int:
    """A number that changes when the files were written again."""
    try:
        found = [(name, (directory / name).stat()) for name in sorted(files)]
    except OSError as error:
        raise DataError(f"{directory} cannot be read: {error}; delete it and prepare the data set again") from error
    return zlib.crc32(repr([(name, status.st_size, status.st_mtime_ns) for name, status in found]).encode())


def _load(place: Path, stamp: int, count: int) -> tuple[np.ndarray, int] | None:
    try:
        with place.open("rb") as file, np.load(file) as archive:  # never unpickles, and zip checks the arrays' CRC
            labels = np.asarray(archive["labels"])
            fits = int(archive["stamp"]) == stamp and labels.shape == (count,) and labels.dtype == np.int32
            return (labels, int(archive["crc"])) if fits else None
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        return None


def _store(place: Path, stamp: int, labels: np.ndarray, crc: int) -> None:
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    # A folder that cannot be written only costs the next reader time.
    with contextlib.suppress(OSError):
        try:
            with part.open("wb") as file:
                np.savez(file, stamp=np.int64(stamp), labels=labels, crc=np.int64(crc))
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
