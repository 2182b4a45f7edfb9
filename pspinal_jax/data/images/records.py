"""Images that TFDS prepared as array_record, read as the encoded bytes that they were stored as."""

import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.cache import Named, read_through_cache
from pspinal_jax.data.copies import digest_bytes
from pspinal_jax.data.dataset import Dataset, check_labels
from pspinal_jax.data.images.encoded import ImageSplit
from pspinal_jax.data.prepared import check_format, import_tfds, open_prepared
from pspinal_jax.errors import DataError
from pspinal_jax.files import expanded

_VALIDATION = ("validation", "valid", "val")


def read_image_records(directory: Path, image_size: int) -> Dataset[ImageSplit]:
    """The images whose dataset_info.json stands in `directory`; they stay encoded.

    The labels are read once, which takes as long as reading all the files, and kept beside the directory.

    Args:
      directory: a prepared data set.
      image_size: side in pixels of what a model sees.

    Raises:
      DataError: if it was not prepared as array_record, has no train and test split of images with labels, or cannot be
        read.
    """
    directory = expanded(directory)
    builder = open_prepared(directory)
    source = check_format(builder)
    own = [{"validation": name} for name in _VALIDATION if name in builder.info.splits][:1]
    names_of = {"train": "train", "test": "test", **(own[0] if own else {})}
    splits = {kind: _read_split(builder, directory, split) for kind, split in names_of.items()}
    label = builder.info.features["label"]
    num_classes = getattr(label, "num_classes", None) or 1 + max(int(split.labels.max()) for split in splits.values())
    for kind, split in splits.items():
        check_labels(f"{source}: {kind}", split.labels, num_classes)
    names = tuple(label.names) if getattr(label, "names", None) else tuple(map(str, range(num_classes)))
    return Dataset(splits, names, source, (image_size, image_size, 3))


def _read_split(builder: Any, directory: Path, split: str) -> ImageSplit:
    info = builder.info.splits[split]
    count = info.num_examples
    if not count:
        raise DataError(f"{directory} has no example in its split {split}; delete it and prepare the data set again")

    def fits(known: Named) -> bool:
        wanted = {"labels": np.int32, "digests": np.uint64}
        return set(known) == {*wanted, "crc"} and all(
            (known[name].shape, known[name].dtype) == ((count,), dtype) for name, dtype in wanted.items()
        )

    stamp = _stamp(directory, info.filenames)
    known = read_through_cache(
        directory, f"{split}.labels", stamp, lambda: _read_labels(Records(directory, split, count)), fits
    )
    return ImageSplit(Records(directory, split, count, int(known["crc"]), known["digests"]), known["labels"])


def _read_labels(records: "Records") -> Named:
    labels, digests, crc = np.zeros(len(records), np.int32), np.zeros(len(records), np.uint64), 0
    for index in range(len(records)):
        example = records.example(index)
        labels[index], digests[index] = example["label"], digest_bytes(example["image"])
        crc = zlib.crc32(example["image"], crc)
    return {"labels": labels, "digests": digests, "crc": np.array(crc)}


def _stamp(directory: Path, files: Iterable[str]) -> str:
    """A number that changes when the files were written again."""
    try:
        found = [(name, (directory / name).stat()) for name in sorted(files)]
    except OSError as error:
        raise DataError(f"{directory} cannot be read: {error}; delete it and prepare the data set again") from error
    return str(zlib.crc32(repr([(name, status.st_size, status.st_mtime_ns) for name, status in found]).encode()))


class Records:
    """The encoded images of one split of a prepared directory; the files are opened when the first is read."""

    def __init__(
        self, directory: Path, split: str, length: int, crc: int = 0, digests: np.ndarray | None = None
    ) -> None:
        self.directory, self.split, self.length, self.crc = directory, split, length, crc
        self._digests = np.zeros(length, np.uint64) if digests is None else digests
        self._source: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[Path, str, int, int, np.ndarray]:
        return self.directory, self.split, self.length, self.crc, self._digests

    def __setstate__(self, state: tuple[Path, str, int, int, np.ndarray]) -> None:
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
        """The checksum of the images."""
        return self.crc

    def digests(self) -> np.ndarray:
        """The digests that were given, uint64 [N]."""
        return self._digests


def _open_split(directory: Path, split: str) -> Any:
    tfds = import_tfds()
    return open_prepared(directory).as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
