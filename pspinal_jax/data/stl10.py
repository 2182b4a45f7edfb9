"""STL-10's binary files, in a folder or in the archive that they are published in."""

from pathlib import Path

import numpy as np

from pspinal_jax.data.archives import read_tar
from pspinal_jax.data.catalogue import DataSet
from pspinal_jax.data.idx import Arrays
from pspinal_jax.errors import DataError

_CLASS_NAMES = "class_names.txt"
_SIDE = 96
_IMAGE_BYTES = 3 * _SIDE * _SIDE


def read_stl10(data_set: DataSet, place: Path) -> Arrays:
    """The splits 'train' and 'test' from the binary files in `place`: uint8 [N, 96, 96, 3], labels from 0.

    Each image is stored as three planes (red, green, blue), a plane column by column. The unlabelled images are not
    read; class_names.txt, where it is there, has to name the classes we know.

    Args:
      data_set: its entry in the catalogue.
      place: folder with the files, or with their folder stl10_binary, or with stl10_binary.tar.gz; or that archive.

    Raises:
      DataError: if files are missing, damaged, or do not belong together.
    """
    files, where = _find_files(data_set, place)
    if _CLASS_NAMES in files:
        names = tuple(files[_CLASS_NAMES].decode(errors="replace").split())
        if names != data_set.class_names:
            raise DataError(f"{_CLASS_NAMES} in {where} names other classes than {', '.join(data_set.class_names)}")
    return {split: _read_split(data_set, files, where, *pair) for split, pair in data_set.files.items()}


def _find_files(data_set: DataSet, place: Path) -> tuple[dict[str, bytes], str]:
    wanted = {*data_set.file_names, _CLASS_NAMES}
    takes = f"{data_set.name} takes a folder with {data_set.archive}, or with {', '.join(data_set.file_names)}"
    if not place.exists():
        raise DataError(f"{place} does not exist; {takes}")
    for folder in (place, place / data_set.archive_folder):
        if all((folder / name).is_file() for name in data_set.file_names):
            there = [name for name in wanted if (folder / name).is_file()]
            return {name: (folder / name).read_bytes() for name in there}, str(folder)
    archive = place / str(data_set.archive) if place.is_dir() else place
    if not archive.is_file():
        raise DataError(f"{place} holds neither; {takes}")
    paths = {f"{data_set.archive_folder}/{name}": name for name in wanted}
    with archive.open("rb") as stream:
        members = read_tar(stream, str(archive), lambda path: path.removeprefix("./") in paths)
    files = {paths[path.removeprefix("./")]: content for path, content in members.items()}
    missing = [name for name in data_set.file_names if name not in files]
    if missing:
        raise DataError(f"{archive} lacks {', '.join(missing)}; get the file again")
    return files, str(archive)


def _read_split(
    data_set: DataSet, files: dict[str, bytes], where: str, image_file: str, label_file: str
) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = (np.frombuffer(files[name], np.uint8) for name in (image_file, label_file))
    if not len(pixels) or len(pixels) % _IMAGE_BYTES:
        raise DataError(
            f"{image_file} in {where} has {len(pixels)} bytes, expected a multiple of {_IMAGE_BYTES}; "
            "get the file again"
        )
    images = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 3, 2, 1)
    if len(images) != len(labels):
        raise DataError(f"{image_file} in {where} holds {len(images)} images but {label_file} {len(labels)} labels")
    low, high = int(labels.min()), int(labels.max())
    if low < 1 or high > data_set.num_classes:
        raise DataError(
            f"{label_file} in {where} holds labels from {low} to {high}, expected 1 .. {data_set.num_classes}"
        )
    return images, labels.astype(np.int32) - data_set.first_label
