"""Pictures in class folders as published, in a folder or an archive: found, checked, divided into splits."""

import contextlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import numpy as np

from pspinal_jax.data.archives import open_zip, read_tar, read_zip_member
from pspinal_jax.data.catalogue import DataSet
from pspinal_jax.data.examples import Examples
from pspinal_jax.data.images.checks import check
from pspinal_jax.data.images.images import Encoded, Files, ImageSplit, is_picture, list_pictures
from pspinal_jax.errors import DataError
from pspinal_jax.progress import progress_bar

_SEED = 0
_NAMED = 5
_MOST_BYTES = 2**28  # of a picture; what claims more is no photograph

_Classes: TypeAlias = dict[str, list[int]]
"""Class -> numbers of its pictures."""


class _InZip:
    """The pictures `entries` of a zip that is kept open."""

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
    """Pictures that were read already, by their paths."""

    def __init__(self, members: dict[str, bytes]) -> None:
        self.names, self.contents = list(members), list(members.values())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bytes:
        return self.contents[index]

    def name(self, index: int) -> str:
        return self.names[index]


def read_pictures(
    data_set: DataSet, place: Path, archives: contextlib.ExitStack, show_progress: bool = False
) -> Examples:
    """The examples of `data_set`, a set of pictures in class folders, from `place`; the pictures stay encoded.

    Every picture is decoded once. One that cannot be is left out and named in the result. Where the set has only one
    folder, `data_set.num_train` of each class are drawn to train on, always the same.

    Args:
      data_set: its entry in the catalogue; says which folders to look for.
      place: a folder with those folders, at any depth; or one with the archive that holds them; or that archive.
      archives: what is opened is closed with it; the result can be used until then.
      show_progress: whether to show a bar on standard error.

    Raises:
      DataError: if the folders are not there, or are not those of the set; if a class has too few pictures that can be
        decoded.
    """
    encoded, paths = _open(data_set, place, archives)
    found = _find(data_set, place, paths)
    class_names = _class_names(data_set, place, found)
    indices = [index for classes in found.values() for each in classes.values() for index in each]
    with progress_bar(len(indices), f"check {data_set.name}", "picture", show_progress) as bar:
        bad = set()
        for index, checked in zip(indices, check(encoded, indices), strict=True):
            if checked.problem is not None:
                bad.add(index)
            bar.update()
    splits = {}
    for split, classes in found.items():
        good = {name: [index for index in classes[name] if index not in bad] for name in class_names}
        splits[split] = _make_split(encoded, f"{place}: {data_set.files[split][0]}", good)
    if data_set.num_train:
        (everything,) = splits.values()
        splits = _draw(data_set, place, everything, class_names)
    images = {split: (photos.encoded, photos.labels) for split, photos in splits.items()}
    return Examples(images, class_names, tuple(encoded.name(index) for index in indices if index in bad))


def _open(data_set: DataSet, place: Path, archives: contextlib.ExitStack) -> tuple[Encoded, list[str]]:
    """All pictures of `place`, and the path of each with '/' in it."""
    if not place.exists():
        raise DataError(f"{place} does not exist; {_wanted(data_set)}")
    if place.is_file():
        return _open_archive(data_set, place, archives)
    files = list_pictures(place)
    paths = [f"{place.resolve().name}/{file}" for file in files]  # `place` may be one of the folders itself
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
            return _in_memory(read_tar(stream, str(path), _is_picture_path))
    archive = archives.enter_context(open_zip(path))
    for entry in archive.namelist():
        if PurePosixPath(entry).name in _tar_names(data_set) and _is_visible(entry):
            content = io.BytesIO(read_zip_member(archive, path, entry))
            return _in_memory(read_tar(content, f"{entry} in {path}", _is_picture_path))
    entries = [entry for entry in archive.namelist() if _is_picture_path(entry)]
    return _InZip(archive, path, entries), entries


def _in_memory(members: dict[str, bytes]) -> tuple[Encoded, list[str]]:
    return _InMemory(members), list(members)


def _is_picture_path(path: str) -> bool:
    return _is_visible(path) and is_picture(PurePosixPath(path).name)


def _is_visible(path: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(path).parts)


def _roots(data_set: DataSet, paths: Sequence[str]) -> dict[str, dict[str, _Classes]]:
    """Folder -> split -> class -> numbers of its pictures, for every folder that holds all splits' folders."""
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
    return f"{data_set.name} takes a folder with {folders} (class folders of pictures), or {archive}"


def _class_names(data_set: DataSet, place: Path, found: dict[str, _Classes]) -> tuple[str, ...]:
    names = sorted({name for classes in found.values() for name in classes})
    for split, classes in found.items():
        missing = [name for name in names if name not in classes]
        if missing:
            first = ", ".join(missing[:_NAMED]) + (", .." if len(missing) > _NAMED else "")
            raise DataError(f"{place}: {data_set.files[split][0]} has no pictures of {first}; get the files again")
    if len(names) != data_set.num_classes:
        raise DataError(
            f"{place} holds {len(names)} classes, but {data_set.name} has {data_set.num_classes}; get that release, or "
            "train on the folder itself"
        )
    return tuple(names)


def _make_split(encoded: Encoded, where: str, classes: _Classes) -> ImageSplit:
    for name, indices in classes.items():
        if not indices:
            raise DataError(f"{where} has no picture of {name} that can be decoded; get the files again")
    labels = np.zeros(len(encoded), np.int32)
    for label, indices in enumerate(classes.values()):
        labels[indices] = label
    return ImageSplit(encoded, labels).take(np.concatenate(list(classes.values())))


def _draw(data_set: DataSet, place: Path, photos: ImageSplit, class_names: Sequence[str]) -> dict[str, ImageSplit]:
    """`data_set.num_train` of each class to train on, the rest to test on; what a class draws hangs on no other."""
    train = []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(photos.labels == label)
        if len(members) <= data_set.num_train:
            raise DataError(
                f"{place} holds {len(members)} pictures of {name} that can be decoded, expected more than "
                f"{data_set.num_train}; get the files again"
            )
        train.append(np.random.default_rng([_SEED, label]).permutation(members)[: data_set.num_train])
    drawn = np.sort(np.concatenate(train))
    rest = np.setdiff1d(np.arange(len(photos)), drawn)
    return {"train": photos.take(drawn), "test": photos.take(rest)}
