"""Images in class folders as published, in a folder or an archive: found, checked, divided into splits."""

import contextlib
import io
import os
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import numpy as np

from pspinal_jax.data.archives import open_zip, read_tar, read_zip_member
from pspinal_jax.data.catalogue import DataSet
from pspinal_jax.data.dataset import draw_by_class
from pspinal_jax.data.images.checks import check
from pspinal_jax.data.images.classes import class_names, in_order
from pspinal_jax.data.images.encoded import Encoded, Examples, Files, ImageSplit, Selected, is_image, list_images
from pspinal_jax.errors import DataError
from pspinal_jax.progress import progress_bar

_SEED = 0
_MOST_BYTES = 2**28  # of an image; what claims more is none

_Classes: TypeAlias = dict[str, list[int]]
"""Class -> numbers of its images."""


class _InZip:
    """The images `entries` of a zip that is kept open."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, entries: Sequence[str]) -> None:
        self.archive, self.path, self.entries = archive, path, entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> bytes:
        size = self.archive.getinfo(self.entries[index]).file_size
        if size > _MOST_BYTES:
            raise DataError(f"{self.entries[index]} claims to have {size} bytes")
        return read_zip_member(self.archive, self.path, self.entries[index])

    def name(self, index: int) -> str:
        return self.entries[index]


class _InMemory:
    """Images that were read already, by their paths."""

    def __init__(self, members: dict[str, bytes]) -> None:
        self.names, self.contents = list(members), list(members.values())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bytes:
        return self.contents[index]

    def name(self, index: int) -> str:
        return self.names[index]


def read_published(
    data_set: DataSet, place: Path, archives: contextlib.ExitStack, show_progress: bool = False
) -> Examples:
    """The examples of `data_set`, a set of images in class folders, from `place`; they stay encoded.

    Every image is decoded once. One that cannot be is left out and named in the result. Where the set has only one
    folder, `data_set.num_train` of each class are drawn to train on, always the same.

    Args:
      data_set: its entry in the catalogue; says which folders to look for.
      place: a folder with those folders, at any depth; or one with the archive that holds them; or that archive.
      archives: what is opened is closed with it; the result can be used until then.
      show_progress: whether to show a bar on standard error.

    Raises:
      DataError: if the folders are not there, or are not those of the set; if a class has too few images that can be
        decoded.
    """
    encoded, paths = _open(data_set, place, archives)
    found = _find(data_set, place, paths)
    names = _class_names(data_set, place, found)
    indices = [index for classes in found.values() for each in classes.values() for index in each]
    with progress_bar(len(indices), f"check {data_set.name}", "image", show_progress) as bar:
        bad = set()
        for index, checked in zip(indices, check(encoded, indices), strict=True):
            if checked.problem is not None:
                bad.add(index)
            bar.update()
    splits = {}
    for split, classes in found.items():
        where = f"{place}: {data_set.files[split][0]}"
        good = {name: [index for index in classes[name] if index not in bad] for name in names}
        numbers, labels = in_order(good, names, partial(_nothing_of, where))
        splits[split] = ImageSplit(Selected(encoded, np.asarray(numbers)), labels)
    if data_set.num_train:
        (everything,) = splits.values()
        splits = _draw(data_set, place, everything, names)
    images = {split: (images.encoded, images.labels) for split, images in splits.items()}
    return Examples(images, names, tuple(encoded.name(index) for index in indices if index in bad))


def _nothing_of(where: str, name: str) -> str:
    return f"{where} has no image of {name} that can be decoded; get the files again"


def _open(data_set: DataSet, place: Path, archives: contextlib.ExitStack) -> tuple[Encoded, list[str]]:
    """All images of `place`, and the path of each with '/' in it."""
    if not place.exists():
        raise DataError(f"{place} does not exist; {_wanted(data_set)}")
    if place.is_file():
        return _open_archive(data_set, place, archives)
    files = list_images(place, linked=True)
    # `place` may be one of the folders itself, or a link to one.
    spellings = (Path(os.path.abspath(place)).name, place.resolve().name)
    own = next((name for name in spellings if name in data_set.file_names), spellings[0])
    paths = [f"{own}/{file}" for file in files]
    if not _roots(data_set, paths) and (archive := _find_archive(data_set, place)):
        return _open_archive(data_set, archive, archives)
    return Files(place, files), paths


def _find_archive(data_set: DataSet, place: Path) -> Path | None:
    if not data_set.archive:
        found = sorted(place.glob("*.zip"))
        if len(found) > 1:
            raise DataError(f"{place} holds {', '.join(path.name for path in found)}; give --raw the one to read")
        return found[0] if found else None
    inner = [f"{folder}{name}" for folder in ("", f"{data_set.archive_folder}/") for name in _tar_names(data_set)]
    return next((place / name for name in (data_set.archive, *inner) if (place / name).is_file()), None)


def _tar_names(data_set: DataSet) -> list[str]:
    return [f"{name}.tar.gz" for name in data_set.file_names]


def _open_archive(data_set: DataSet, path: Path, archives: contextlib.ExitStack) -> tuple[Encoded, list[str]]:
    if path.name.endswith((".tar.gz", ".tgz")):
        with path.open("rb") as stream:
            return _in_memory(read_tar(stream, str(path), _is_image_path))
    archive = archives.enter_context(open_zip(path))
    for entry in archive.namelist():
        if PurePosixPath(entry).name in _tar_names(data_set) and _is_visible(entry):
            content = io.BytesIO(read_zip_member(archive, path, entry))
            return _in_memory(read_tar(content, f"{entry} in {path}", _is_image_path))
    entries = [entry for entry in archive.namelist() if _is_image_path(entry)]
    return _InZip(archive, path, entries), entries


def _in_memory(members: dict[str, bytes]) -> tuple[Encoded, list[str]]:
    return _InMemory(members), list(members)


def _is_image_path(path: str) -> bool:
    return _is_visible(path) and is_image(PurePosixPath(path).name)


def _is_visible(path: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(path).parts)


def _roots(data_set: DataSet, paths: Sequence[str]) -> dict[str, dict[str, _Classes]]:
    """Folder -> split -> class -> numbers of its images, for every folder that holds all splits' folders."""
    split_of = {folder.lower(): split for split, (folder,) in data_set.files.items()}
    roots: dict[str, dict[str, _Classes]] = {}
    for index, path in enumerate(paths):
        *root, folder, name, _ = ["", "", *PurePosixPath(path).parts]
        if folder.lower() in split_of and name != data_set.left_out:
            classes = roots.setdefault("/".join(root), {}).setdefault(split_of[folder.lower()], {})
            classes.setdefault(name, []).append(index)
    return {root: splits for root, splits in roots.items() if len(splits) == len(data_set.files)}


def _find(data_set: DataSet, place: Path, paths: Sequence[str]) -> dict[str, _Classes]:
    roots = _roots(data_set, paths)
    if not roots:
        raise DataError(f"{place} lacks {' or '.join(data_set.file_names)}; {_wanted(data_set)}")
    if len(roots) > 1:
        places = ", ".join(root.strip("/") or "its top" for root in roots)
        raise DataError(f"{place} holds {data_set.name} more than once: in {places}; give --raw one of them")
    (splits,) = roots.values()
    for classes in splits.values():
        for indices in classes.values():
            indices.sort(key=lambda index: paths[index])
    return {split: splits[split] for split in data_set.files}


def _wanted(data_set: DataSet) -> str:
    folders = " and ".join(data_set.file_names)
    archive = data_set.archive or "a zip that holds them"
    return f"{data_set.name} takes a folder with {folders} (class folders of images), or {archive}"


def _class_names(data_set: DataSet, place: Path, found: dict[str, _Classes]) -> tuple[str, ...]:
    names = class_names(
        found,
        lambda split, missing: f"{place}: {data_set.files[split][0]} has no images of {missing}; get the files again",
    )
    if len(names) != data_set.num_classes:
        raise DataError(
            f"{place} holds {len(names)} classes, but {data_set.name} has {data_set.num_classes}; get that release, or "
            "train on the folder itself"
        )
    return names


def _draw(data_set: DataSet, place: Path, images: ImageSplit, names: Sequence[str]) -> dict[str, ImageSplit]:
    """`data_set.num_train` of each class to train on, the rest to test on."""
    for name, count in zip(names, np.bincount(images.labels), strict=True):
        if count <= data_set.num_train:
            raise DataError(
                f"{place} holds {count} images of {name} that can be decoded, expected more than "
                f"{data_set.num_train}; get the files again"
            )
    test, train = draw_by_class(images.labels, lambda count: data_set.num_train, _SEED)
    return {"train": images.take(train), "test": images.take(test)}
