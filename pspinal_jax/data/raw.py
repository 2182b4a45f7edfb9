"""The files of a data set as published (IDX, STL-10's binary files, class folders), in a folder or an archive.

Archives are read in place: nothing is extracted, so no path in them is ever written to.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TypeAlias

import numpy as np

from pspinal_jax.data.catalogue import CATALOGUE, DataSet
from pspinal_jax.data.dataset import ArraySplit, Dataset, Split, array_dataset, draw_by_class
from pspinal_jax.data.folder import check, class_names, in_order
from pspinal_jax.data.images import Encoded, ImageSplit, Selected, is_image, list_images
from pspinal_jax.errors import DataError
from pspinal_jax.files import read_bytes, require_file

MAX_BYTES = 2**30
"""The largest size of one file, or of all that is kept of a tar, once unpacked; a few MB of zip can become many GB."""

UINT8, INT32 = np.dtype(np.uint8), np.dtype(">i4")
_IDX_CODES = {UINT8: 0x08, INT32: 0x0C}
_GZIP_MAGIC = b"\x1f\x8b"
_SEED = 0
# RuntimeError: encrypted, or compressed in a way that Python cannot undo.
_DAMAGED = (OSError, EOFError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile, tarfile.TarError)
_CHUNK = 1 << 20

_Classes: TypeAlias = dict[str, list[int]]
"""Class -> numbers of its images."""


class _Members(Encoded):
    """The files of a folder or an archive, by path, each given by a function."""

    def __init__(self, members: Mapping[str, Callable[[], bytes]]) -> None:
        self.paths, self._read = list(members), list(members.values())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        return self._read[index]()

    def name(self, index: int) -> str:
        return self.paths[index]

    def find(self, name: str) -> int | None:
        """The number of the first file called `name`, compressed or not."""
        names = (name, name.removesuffix(".gz"))
        return next((index for index, path in enumerate(self.paths) if PurePosixPath(path).name in names), None)


def read_raw(
    data_set: DataSet, source: Path, archives: contextlib.ExitStack, show_progress: bool = False
) -> Dataset[Split]:
    """The splits of `data_set` from its files as published: arrays, or encoded images from class folders.

    Args:
      data_set: its entry in the catalogue.
      source: a folder with the files (class folders at any depth) or with the archive that holds them, or that archive.
      archives: what is opened is closed with it; the result can be used until then.
      show_progress: whether to show a bar on standard error while images are checked.

    Raises:
      DataError: if files are missing, damaged, or not those of the set.
    """
    members, source = _open(data_set, source, archives)
    if data_set.in_folders:
        return _read_class_folders(data_set, source, members, show_progress)
    read = _read_stl10 if data_set.layout == "stl10" else _read_idx_pair
    first, last = data_set.first_label, data_set.first_label + data_set.num_classes - 1
    splits = {}
    for split, names in data_set.files.items():
        pair = []
        for name in names:
            index = members.find(name)
            if index is None:
                raise DataError(f"{source} lacks {name}; {_expected(data_set)}")
            pair.append((members[index], f"{source}: {members.paths[index]}"))
        images, labels = read(data_set, *pair)
        if len(images) != len(labels):
            raise DataError(f"{pair[0][1]} holds {len(images)} images but {pair[1][1]} {len(labels)} labels")
        low, high = int(labels.min()), int(labels.max())
        if low < first or high > last:
            raise DataError(f"{pair[1][1]} holds labels from {low} to {high}, expected {first} .. {last}")
        splits[split] = ArraySplit(images, labels.astype(np.int32) - first)
    return array_dataset(splits, data_set.class_names, str(source))


def _expected(data_set: DataSet) -> str:
    archive = f"{data_set.archive}, or with " if data_set.archive else ""
    kind = " (class folders of images)" if data_set.in_folders else ""
    return f"{data_set.name} takes a folder with {archive}{', '.join(data_set.file_names)}{kind}"


def _read_idx_pair(
    data_set: DataSet, image_file: tuple[bytes, str], label_file: tuple[bytes, str]
) -> tuple[np.ndarray, np.ndarray]:
    # MNIST, KMNIST and Fashion-MNIST have the same file names and shapes; only checksums tell them apart.
    owners = {item.sha256: other.name for other in CATALOGUE.values() for item in other.downloads}
    owner = owners.get(hashlib.sha256(label_file[0]).hexdigest(), data_set.name)
    if owner != data_set.name:
        raise DataError(f"{label_file[1]} is the file of {owner}, expected that of {data_set.name}")
    height, width, _ = data_set.image_shape
    images = read_idx(*image_file, UINT8, (height, width))
    if data_set.label_columns is None:
        labels = read_idx(*label_file, UINT8, ())
    else:
        labels = read_idx(*label_file, INT32, (data_set.label_columns,))[:, 0]
    return (images.swapaxes(1, 2) if data_set.transposed else images)[..., None], labels


def read_idx(content: bytes, where: str, dtype: np.dtype, item_shape: tuple[int, ...]) -> np.ndarray:
    """The array in an IDX file: a magic number, big-endian sizes, then the values and nothing else.

    Args:
      content: the file's bytes, plain or gzip.
      where: the file's name in errors.
      dtype: UINT8 or INT32, as the file must declare.
      item_shape: shape of one item, () for labels, as the file must declare.

    Returns:
      Array [N, *item_shape] with N at least 1, uint8 or native int32.

    Raises:
      DataError: if the file is damaged, or of another type or shape.
    """
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_BYTES + 1)
        except _DAMAGED as error:
            raise _unreadable(where, error) from error
        _refuse_large(len(content), where)
    header = 4 * (2 + len(item_shape))
    magic = bytes([0, 0, _IDX_CODES[dtype], 1 + len(item_shape)])
    if content[:4] != magic or len(content) < header:
        raise DataError(
            f"{where} begins with the bytes {content[:4].hex(' ') or '(none)'}, expected {magic.hex(' ')} (IDX of "
            f"{dtype.name} with {magic[3]} dimensions) and {magic[3]} sizes"
        )
    count, *found = map(int, np.frombuffer(content[4:header], ">u4"))
    num_bytes = count * math.prod(found) * dtype.itemsize
    if tuple(found) != item_shape or not count or len(content) - header != num_bytes:
        raise DataError(
            f"{where} declares {count} items of shape {tuple(found)} ({num_bytes} bytes) and has "
            f"{len(content) - header} bytes, expected shape {item_shape}; get the file again"
        )
    values = np.frombuffer(content, dtype, offset=header)
    return values.astype(dtype.newbyteorder("="), copy=False).reshape(count, *found)


def _read_stl10(
    data_set: DataSet, image_file: tuple[bytes, str], label_file: tuple[bytes, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Each image is stored as three planes (red, green, blue), a plane column by column."""
    pixels, size = np.frombuffer(image_file[0], np.uint8), math.prod(data_set.image_shape)
    height, width, channels = data_set.image_shape
    if not len(pixels) or len(pixels) % size:
        raise DataError(f"{image_file[1]} has {len(pixels)} bytes, expected a multiple of {size}; get the file again")
    images = pixels.reshape(-1, channels, width, height).transpose(0, 3, 2, 1)
    return images, np.frombuffer(label_file[0], np.uint8)


def _read_class_folders(data_set: DataSet, source: Path, members: _Members, show_progress: bool) -> Dataset[ImageSplit]:
    """Images that cannot be decoded are left out; `num_train` of each class are drawn where there is one folder."""
    roots = _roots(data_set, members)
    if len(roots) != 1:
        where = ", ".join(root.strip("/") or "its top" for root in roots) or "no folder"
        raise DataError(f"{source}: {where} holds all of {data_set.name}, expected one folder; {_expected(data_set)}")
    (found,) = roots.values()
    folders = {split: f"{source}: {folder}" for split, (folder,) in data_set.files.items()}
    names = class_names(found, folders)
    if len(names) != data_set.num_classes:
        raise DataError(
            f"{source} holds {len(names)} classes, but {data_set.name} has {data_set.num_classes}; get that release, "
            "or train on the folder itself"
        )
    indices = [index for split in folders for each in found[split].values() for index in each]
    checks = check(members, indices, f"check {data_set.name}", show_progress)
    bad = {index for index, checked in zip(indices, checks, strict=True) if checked.problem is not None}
    splits = {}
    for split, folder in folders.items():
        good = {name: sorted(set(found[split][name]) - bad, key=lambda index: members.paths[index]) for name in names}
        numbers, labels = in_order(good, names, folder)
        splits[split] = ImageSplit(Selected(members, np.asarray(numbers)), labels)
    if data_set.num_train:
        (everything,) = splits.values()
        counts = np.bincount(everything.labels)
        if counts.min() <= data_set.num_train:
            raise DataError(
                f"{source} holds {counts.min()} images of {names[counts.argmin()]} that can be decoded, expected more "
                f"than {data_set.num_train}; get the files again"
            )
        test, train = draw_by_class(everything.labels, lambda count: data_set.num_train, _SEED)
        splits = {"train": everything.take(train), "test": everything.take(test)}
    skipped = tuple(members.name(index) for index in indices if index in bad)
    return Dataset(splits, names, str(source), (0, 0, 3), skipped=skipped)


def _roots(data_set: DataSet, members: _Members) -> dict[str, dict[str, _Classes]]:
    """Folder -> split -> class -> numbers of its images, for every folder that holds all splits' folders."""
    split_of = {folder.lower(): split for split, (folder,) in data_set.files.items()}
    roots: dict[str, dict[str, _Classes]] = {}
    for index, path in enumerate(members.paths):
        *root, folder, name, _ = ["", "", *PurePosixPath(path).parts]
        if folder.lower() in split_of and name != data_set.left_out:
            classes = roots.setdefault("/".join(root), {}).setdefault(split_of[folder.lower()], {})
            classes.setdefault(name, []).append(index)
    return {root: splits for root, splits in roots.items() if len(splits) == len(data_set.files)}


def _open(data_set: DataSet, source: Path, archives: contextlib.ExitStack) -> tuple[_Members, Path]:
    """The files of `source` that the set may need, and the folder or archive that they are read from."""
    if not source.exists():
        raise DataError(f"{source} does not exist; {_expected(data_set)}")
    if not source.is_dir():
        return _open_archive(data_set, source, archives), source
    if data_set.in_folders:
        # `source` may be one of the class folders' folders itself, or a link to one.
        spellings = (Path(os.path.abspath(source)).name, source.resolve().name)
        top = next((name for name in spellings if name in data_set.file_names), spellings[0])
        files = {f"{top}/{file}": source / file for file in list_images(source, linked=True)}
    else:
        entries = [path for folder in (source, source / data_set.archive_folder) for path in folder.glob("*")]
        files = {path.relative_to(source).as_posix(): path for path in entries if path.is_file()}
    members = _Members({path: partial(read_bytes, file, MAX_BYTES) for path, file in files.items()})
    found = _roots(data_set, members) if data_set.in_folders else None not in map(members.find, data_set.file_names)
    archive = None if found else _find_archive(data_set, source)
    return (members, source) if archive is None else (_open_archive(data_set, archive, archives), archive)


def _find_archive(data_set: DataSet, source: Path) -> Path | None:
    if not data_set.archive:
        found = sorted(source.glob("*.zip"))
        if len(found) > 1:
            raise DataError(f"{source} holds {', '.join(path.name for path in found)}; give --raw the one to read")
        return found[0] if found else None
    inner = [f"{folder}{name}" for folder in ("", f"{data_set.archive_folder}/") for name in _tar_names(data_set)]
    return next((source / name for name in (data_set.archive, *inner) if (source / name).is_file()), None)


def _tar_names(data_set: DataSet) -> list[str]:
    return [f"{name}.tar.gz" for name in data_set.file_names]


def _open_archive(data_set: DataSet, path: Path, archives: contextlib.ExitStack) -> _Members:
    def needed(member: str) -> bool:
        parts, name = PurePosixPath(member).parts, PurePosixPath(member).name
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            return False
        return is_image(name) if data_set.in_folders else name in data_set.file_names

    if path.name.endswith((".tar.gz", ".tgz")):
        with path.open("rb") as stream:
            return _Members(read_tar(stream, str(path), needed))
    archive = archives.enter_context(open_zip(path))
    for entry in archive.namelist():
        if PurePosixPath(entry).name in _tar_names(data_set) and not entry.startswith("__MACOSX"):
            content = io.BytesIO(read_zip_member(archive, path, entry))
            return _Members(read_tar(content, f"{entry} in {path}", needed))
    needed_entries = filter(needed, archive.namelist())
    return _Members({entry: partial(read_zip_member, archive, path, entry) for entry in needed_entries})


def open_zip(path: Path) -> zipfile.ZipFile:
    """The zip file at `path`; DataError if it is not a zip file."""
    try:
        require_file(path)
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a zip file: {error}; get the file again") from error


def read_zip_member(archive: zipfile.ZipFile, path: Path, entry: str) -> bytes:
    """The member `entry` of the zip at `path`.

    Raises:
      DataError: if it is damaged, or larger than `MAX_BYTES` once unpacked.
    """
    _refuse_large(archive.getinfo(entry).file_size, f"{entry} in {path}")  # no more than that is ever read
    try:
        return archive.read(entry)  # as a whole: read piece by piece, its checksum could be skipped
    except _DAMAGED as error:
        raise _unreadable(f"{entry} in {path}", error) from error


def read_tar(stream: IO[bytes], where: str, needed: Callable[[str], bool]) -> dict[str, Callable[[], bytes]]:
    """What gives the content of each file of a tar.gz whose path is `needed`; links and folders are passed over.

    Args:
      stream: the archive, from its start; read to its end, so that all checksums are.
      where: its name in errors.
      needed: whether to keep the member with that path.

    Raises:
      DataError: if the archive is damaged, or holds more than `MAX_BYTES`.
    """
    members: dict[str, Callable[[], bytes]] = {}
    size = 0
    try:
        with gzip.GzipFile(fileobj=stream) as unzipped:
            with tarfile.open(fileobj=unzipped, mode="r|") as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isfile() and needed(member.name) else None
                    if file is not None:
                        size += member.size
                        _refuse_large(size, where)
                        members[member.name] = partial(bytes, file.read())
            while piece := unzipped.read(_CHUNK):
                size += len(piece)
                _refuse_large(size, where)
    except _DAMAGED as error:
        raise _unreadable(where, error) from error
    return members


def _refuse_large(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise DataError(f"{where} has {size} bytes unpacked, expected at most {MAX_BYTES}; get the file again")


def _unreadable(where: str, error: Exception) -> DataError:
    return DataError(f"{where} cannot be read: {error}; get the file again")
