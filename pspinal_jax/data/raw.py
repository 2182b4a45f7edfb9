"""From raw files as published, in a folder or a zip, to checked arrays."""

import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pspinal_jax.data.archives import open_zip, read_zip_member
from pspinal_jax.data.catalogue import CATALOGUE, DataSet
from pspinal_jax.data.idx import INT32, UINT8, read_idx
from pspinal_jax.errors import DataError

Arrays: TypeAlias = dict[str, tuple[np.ndarray, np.ndarray]]
"""Split -> (images uint8 [N, H, W, C], labels int32 [N], each 0 .. C-1)."""

_LABELS_MOST_BYTES = 2**20

_Open: TypeAlias = Callable[[str], tuple[Path | bytes, str]]
"""From a file's name upstream to what `read_idx` takes: the source, and what to call it."""


def read_raw(data_set: DataSet, place: Path) -> Arrays:
    """The splits 'train' and 'test' of `data_set` from the raw files in `place`, images upright, labels from 0.

    Args:
      data_set: which set.
      place: folder with the files under their names upstream, gzip or not; for EMNIST also the folder of the zip or of
        what it extracts to, or the zip itself.

    Raises:
      DataError: if files are missing, damaged, or do not belong together.
    """
    with _opener(data_set, place) as open_file:
        return {split: _read_split(data_set, files, open_file) for split, files in data_set.files.items()}


def _read_split(data_set: DataSet, files: Sequence[str], open_file: _Open) -> tuple[np.ndarray, np.ndarray]:
    image_file, label_file = files
    height, width, _ = data_set.image_shape
    assert height is not None and width is not None, data_set.name
    source, where_images = open_file(image_file)
    images = read_idx(source, where_images, UINT8, (height, width))
    source, where_labels = open_file(label_file)
    if data_set.label_columns is None:
        labels = read_idx(source, where_labels, UINT8, ())
    else:
        labels = read_idx(source, where_labels, INT32, (data_set.label_columns,))[:, 0]
    if len(images) != len(labels):
        raise DataError(f"{where_images} holds {len(images)} images but {where_labels} {len(labels)} labels")
    first, last = data_set.first_label, data_set.first_label + data_set.num_classes - 1
    low, high = int(labels.min()), int(labels.max())
    if low < first or high > last:
        raise DataError(f"{where_labels} holds labels from {low} to {high}, expected {first} .. {last}")
    if data_set.transposed:
        images = images.swapaxes(1, 2)
    return images[..., None], labels.astype(np.int32) - first


@contextlib.contextmanager
def _opener(data_set: DataSet, place: Path) -> Iterator[_Open]:
    if not place.exists():
        raise DataError(f"{place} does not exist; {_wanted(data_set)}")
    found = {name: _find(data_set, place, name) for name in data_set.file_names} if place.is_dir() else {}
    if found and all(found.values()):
        _refuse_another_sets(data_set, [path for path in found.values() if path])
        yield lambda name: (found[name] or place, str(found[name]))
        return
    archive = place / data_set.archive if data_set.archive and place.is_dir() else place
    if data_set.archive and archive.is_file():
        with open_zip(archive) as opened:
            yield lambda name: _member(data_set, opened, archive, name)
        return
    if not place.is_dir():
        raise DataError(f"{place} is no folder; {_wanted(data_set)}")
    missing = ", ".join(name for name, path in found.items() if path is None)
    raise DataError(f"{place} lacks {missing}; {_wanted(data_set)}")


def _wanted(data_set: DataSet) -> str:
    names = f"{', '.join(data_set.file_names)}, as downloaded or decompressed"
    return f"{data_set.name} takes a folder with {f'{data_set.archive}, or with ' if data_set.archive else ''}{names}"


def _find(data_set: DataSet, folder: Path, name: str) -> Path | None:
    folders = [folder, folder / data_set.archive_folder] if data_set.archive_folder else [folder]
    candidates = [place / spelled for place in folders for spelled in (name, name.removesuffix(".gz"))]
    return next((path for path in candidates if path.is_file()), None)


def _refuse_another_sets(data_set: DataSet, paths: list[Path]) -> None:
    """MNIST, KMNIST and Fashion-MNIST have the same file names and shapes; only checksums tell them apart."""
    owners = {item.sha256: other.name for other in CATALOGUE.values() for item in other.downloads}
    for path in paths:
        if path.stat().st_size > _LABELS_MOST_BYTES:
            continue  # the labels tell, and take no time to check
        owner = owners.get(hashlib.sha256(path.read_bytes()).hexdigest(), data_set.name)
        if owner != data_set.name:
            raise DataError(f"{path} is the file of {owner}, not of {data_set.name}; give {data_set.name}'s own folder")


def _member(data_set: DataSet, archive: zipfile.ZipFile, path: Path, name: str) -> tuple[bytes, str]:
    return read_zip_member(archive, path, f"{data_set.archive_folder}/{name}"), f"{name} in {path}"
