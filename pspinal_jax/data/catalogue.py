"""The data sets that we can prepare ourselves; catalogue.toml says what they are made of. Imports nothing heavy."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pspinal_jax.errors import UsageError

OUR_VERSION = "1.0.0"
"""The version of what we prepare. Unlike the numbers of TFDS's own versions, so that the two can lie side by side."""


@dataclasses.dataclass(frozen=True)
class Download:
    """A file as published; `num_bytes` is None where no size is on record."""

    file: str
    url: str
    sha256: str
    num_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set: its files, and how to read them.

    Attributes:
      name: what `prepare` and TFDS call it.
      image_shape: (H, W, C); H and W are None where images differ.
      class_names: in the order of the labels 0 .. C-1; empty where the folders' names are taken.
      files: split -> (file of images, file of labels); for images in class folders, split -> (its folder,). Empty for
        the set that scikit-learn ships.
      downloads: what to fetch: those files, or the archive that holds them.
      folder: name of the folder that downloads go to; MNIST's names recur in KMNIST and Fashion-MNIST.
      archive: name of the archive that holds the files, or "".
      archive_folder: folder inside that archive, and what extracting it makes.
      first_label: the label of class 0 as stored.
      label_columns: None for labels alone, else int32 columns of which the first is the label.
      transposed: whether images are stored with rows and columns swapped.
      parts: further splits: name -> {split: where they are cut from, start, end: examples; to the last without end}.
      keep_order: whether examples stay in the files' order; otherwise TFDS shuffles them, the same way every time.
      layout: how the files are stored.
      num_folders: number of class folders, for a set of images in class folders.
      left_out: a folder among them that is not a class.
      num_train: how many images of each class are drawn to train on, of a set that has only one folder; the rest is
        to test on.
      origin: where the files come from, if nothing can be downloaded.
      row: the row of the paper's table that was measured on it, or "".
      sizes: how many examples it has to train on, validation included, and to test on; of those with a row.
    """

    name: str
    image_shape: tuple[Any, Any, int] = (None, None, 3)
    class_names: tuple[str, ...] = ()
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    downloads: tuple[Download, ...] = ()
    folder: str = ""
    archive: str = ""
    archive_folder: str = ""
    first_label: int = 0
    label_columns: int | None = None
    transposed: bool = False
    parts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    keep_order: bool = True
    layout: Literal["idx", "stl10", "class folders"] = "idx"
    num_folders: int = 0
    left_out: str = ""
    num_train: int = 0
    origin: str = ""
    row: str = ""
    sizes: tuple[int, int] = (0, 0)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names) or self.num_folders

    @property
    def in_folders(self) -> bool:
        """Whether it is made of images in class folders, which stay as they were encoded."""
        return self.layout == "class folders"

    @property
    def file_names(self) -> tuple[str, ...]:
        """Every file's name in `files`."""
        return tuple(name for names in self.files.values() for name in names)


def _load() -> dict[str, DataSet]:
    entries = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8"))
    catalogue = {}
    for name, entry in entries.items():
        values: dict[str, Any] = {
            field: tuple(value) if isinstance(value, list) else value for field, value in entry.items()
        }
        values["downloads"] = tuple(Download(**item) for item in entry.get("downloads", ()))
        values["files"] = {split: tuple(names) for split, names in entry.get("files", {}).items()}
        catalogue[name] = DataSet(name, **values)
    return catalogue


CATALOGUE = _load()


def find_data_set(name: str) -> DataSet:
    """The entry `name`; a recipe's spelling with hyphens is understood too.

    Raises:
      UsageError: if there is none.
    """
    key = name.replace("-", "_")
    if key not in CATALOGUE:
        raise UsageError(f"unknown data set {name!r}, expected one of {', '.join(CATALOGUE)}")
    return CATALOGUE[key]
