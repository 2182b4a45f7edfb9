"""A folder of images: a folder per class, with or without folders per split above them.

Every image is decoded once; what was found is remembered from one start to the next.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from pspinal_jax.data.dataset import Dataset, cut_test, first_names
from pspinal_jax.data.images import Encoded, Files, ImageSplit, is_image, list_images
from pspinal_jax.distributed import is_primary
from pspinal_jax.errors import DataError
from pspinal_jax.files import cache_folder, expanded, write_text
from pspinal_jax.progress import progress_bar, warn

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}
"""Split -> names of its folder, in lower case."""

T = TypeVar("T")
_CHECK_SIZE = (16, 16)  # every byte is decoded whatever the size, and resizing costs least so
_CACHE_FORMAT = 3


def read_folder(
    path: Path,
    *,
    image_size: int,
    test_fraction: float,
    split_seed: int,
    strict: bool,
    keep_copies_together: bool = True,
    needs_test: bool = True,
    show_progress: bool = False,
) -> Dataset[ImageSplit]:
    """The images below `path`, in folders that bear the classes' names.

    Above the class folders there may be one for each split: train (or Training), test, and perhaps validation (or
    valid, val), in any case.

    Args:
      path: the folder.
      image_size: side in pixels of a model's input.
      test_fraction: where there are no folders for splits, the fraction of each class that makes the test split.
      split_seed: decides that draw.
      strict: whether an image that cannot be decoded is an error; otherwise it is left out, with a warning.
      keep_copies_together: whether files of the same content go to one side of that draw.
      needs_test: whether a draw that gives no test example is an error.
      show_progress: whether to show a bar on standard error while decoding.

    Raises:
      UsageError: if `test_fraction` is needed and does not lie between 0 and 1.
      DataError: if there are fewer than two classes (a folder that holds no image in any split is left out, with a
        warning), a class without a readable image in a split, splits whose classes differ, or, if `strict`, an image
        that cannot be decoded.
    """
    path = expanded(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give a folder of class folders")
    folders = find_split_folders(path) or {"all": ""}
    listed = {split: _list_classes(path, folder) for split, folder in folders.items()}
    full = {name for classes in listed.values() for name, files in classes.items() if files}
    empty = sorted({name for classes in listed.values() for name in classes} - full)
    listed = {
        split: {name: files for name, files in classes.items() if name in full} for split, classes in listed.items()
    }
    where = {split: str(path / folder) for split, folder in folders.items()}
    names = class_names(listed, where)
    if len(names) < 2:
        raise DataError(
            f"{path} holds {len(names)} class folders with images in them ({', '.join(names)}), expected two or more"
        )
    files = [file for classes in listed.values() for each in classes.values() for file in each]
    checks = check_files(path, files, show_progress)
    skipped = [file for file in files if checks[file].problem is not None]
    warn_of_skipped([f"{file} ({checks[file].problem})" for file in skipped], str(path), strict)
    splits = {}
    for split, classes in listed.items():
        good = {name: [file for file in each if checks[file].problem is None] for name, each in classes.items()}
        found, labels = in_order(good, names, where[split])
        crcs, sizes = [checks[file].crc for file in found], [checks[file].size for file in found]
        splits[split] = ImageSplit(Files(path, found, crcs, sizes), labels)
    passed_over = _find_passed_over(path, folders, empty, frozenset(files))
    for line in passed_over if is_primary() else ():
        warn(line)
    uncut = "all" in splits
    splits = {"train": splits["all"]} if uncut else splits
    shape = (image_size, image_size, 3)
    data = Dataset(splits, names, str(path), shape, skipped=tuple(skipped), passed_over=passed_over)
    if not uncut:
        return data
    data = cut_test(data, test_fraction, split_seed, keep_copies_together, needs_test=False)
    if needs_test and not len(data.test):
        raise DataError(f"{path} has too few images to test on {test_fraction} of each class; choose a larger fraction")
    return data


def find_split_folders(path: Path) -> dict[str, str]:
    """Split -> name of its folder in `path`; empty if `path` holds class folders.

    Raises:
      DataError: if a split has two folders, or there is one to train on and none to test on.
    """
    names = _folders(path)
    found = {}
    for split, spellings in SPLIT_FOLDERS.items():
        matching = [name for name in names if name.lower() in spellings]
        if len(matching) > 1:
            raise DataError(f"{path} holds {' and '.join(matching)}; keep one folder for the {split} split")
        if matching:
            found[split] = matching[0]
    if {"train", "test"} <= set(found):
        return found
    # Classes may have such names; but then they hold images, not folders.
    only_splits = 1 < len(found) == len(names) and all(_folders(path / name) for name in names)
    if only_splits or ("train" in found and _folders(path / found["train"])):
        raise DataError(f"{path} holds {' and '.join(found.values())}, expected a folder train and a folder test")
    return {}


def class_names(found: Mapping[str, Mapping[str, object]], where: Mapping[str, str]) -> tuple[str, ...]:
    """The classes of all splits in `found` (split -> class -> images), sorted.

    Args:
      found: the splits.
      where: split -> its folder, for messages.

    Raises:
      DataError: if a split lacks a class that another has.
    """
    names = sorted({name for classes in found.values() for name in classes})
    for split, classes in found.items():
        missing = [name for name in names if name not in classes]
        if missing:
            raise DataError(
                f"{where[split]} lacks classes that another split has: {first_names(missing)}; every split needs a "
                "folder of each class"
            )
    return tuple(names)


def in_order(classes: Mapping[str, Sequence[T]], names: Sequence[str], where: str) -> tuple[list[T], np.ndarray]:
    """The images of all classes, class by class, and their labels int32 [N].

    Raises:
      DataError: if a class has none; the message names the folder, `where`.
    """
    for name in names:
        if not classes[name]:
            raise DataError(f"{where}/{name} holds no image that can be decoded; fill or remove it")
    images = [image for name in names for image in classes[name]]
    return images, np.repeat(np.arange(len(names), dtype=np.int32), [len(classes[name]) for name in names])


def warn_of_skipped(names: Sequence[str], source: str, strict: bool = False) -> None:
    """Report how many images of `source` cannot be decoded, and the first of them.

    Raises:
      DataError: instead of a warning, if `strict`.
    """
    line = f"{source}: {len(names)} images cannot be decoded: {first_names(names)}"
    if names and strict:
        raise DataError(f"{line}; repair or remove them, or leave --data.strict out")
    if names and is_primary():
        warn(f"{line}; left out")


def _list_classes(path: Path, folder: str) -> dict[str, list[str]]:
    """Class -> its images, sorted paths relative to `path`, in a split's `folder` or, with "", in `path` itself."""
    prefix = f"{folder}/" if folder else ""
    return {
        name: [f"{prefix}{name}/{file}" for file in list_images(path / folder / name)]
        for name in _folders(path / folder)
    }


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_dir())


def _find_passed_over(
    path: Path, folders: Mapping[str, str], empty: Sequence[str], taken: frozenset[str]
) -> tuple[str, ...]:
    """A line for each kind of thing in `path` that holds no example of any split, though a user may think it does."""
    inside = sorted(filter(None, folders.values()))
    loose, links, others = [], [], []
    for root in [path / folder for folder in inside] or [path]:
        loose += [file for file in sorted(root.iterdir()) if is_image(file.name) and not file.is_dir()]
        for each in _folders(root):
            for folder, inner, files in os.walk(root / each):
                inner[:] = [name for name in inner if not name.startswith(".")]
                links += [Path(folder, name) for name in inner if Path(folder, name).is_symlink()]
                others += [Path(folder, name) for name in files if not name.startswith(".")]

    def relative(paths: list[Path]) -> list[str]:
        return [file.relative_to(path).as_posix() for file in paths]

    unknown = sorted(set(relative(others)) - taken)
    suffixes = ", ".join(sorted({os.path.splitext(file)[1] or "no suffix" for file in unknown}))
    found = {
        "class folders without an image": empty,
        f"folders beside {', '.join(inside)}": [name for name in _folders(path) if inside and name not in inside],
        "pictures beside the class folders, in no class": relative(loose),
        "linked folders inside a class": sorted(relative(links)),
        f"files in class folders with another suffix ({suffixes})": unknown,
    }
    return tuple(
        f"{path}: left out {len(names)} {kind}: {first_names(names)}" for kind, names in found.items() if names
    )


class Check(NamedTuple):
    """An image decoded once: the checksum and size of its bytes, and why it cannot be used (None if it can)."""

    crc: int
    size: int
    problem: str | None


def check(encoded: Encoded, indices: Sequence[int], title: str, show_progress: bool) -> list[Check]:
    """Read and decode the images at `indices` on a few threads."""
    found = []
    with progress_bar(len(indices), title, "image", show_progress) as bar, ThreadPoolExecutor() as pool:
        for checked in pool.map(partial(_check, encoded), indices):
            found.append(checked)
            bar.update()
    return found


def _check(encoded: Encoded, index: int) -> Check:
    from pspinal_jax.data.images.decode import decode  # loads Pillow, which `prepare --help` can do without

    data, problem = b"", None
    try:
        data = encoded[index]
        decode(data, _CHECK_SIZE)
    except (OSError, DataError) as error:
        problem = (getattr(error, "strerror", None) or str(error)).removeprefix("the image cannot be decoded: ")
    return Check(zlib.crc32(data), len(data), problem)


def check_files(root: Path, files: Sequence[str], show_progress: bool) -> dict[str, Check]:
    """A check on each of `files`, paths relative to `root`; what was good and has not changed since is not read.

    The checks are stored in the user's `cache_folder`. Where they cannot be, it only takes time. A file that could not
    be decoded is tried again, perhaps by a newer Pillow.
    """
    stamps = {file: _stamp(root / file) for file in files}
    folder = cache_folder()
    cache = folder and folder / "pictures" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.json"
    known = _load(cache) if cache else {}
    checks = {file: Check(*known[file][1]) for file in files if file in known and known[file][0] == stamps[file]}
    new = [file for file in files if file not in checks]
    if new:
        found = check(Files(root, new), range(len(new)), f"check images in {root.name}", show_progress)
        checks |= zip(new, found, strict=True)
        if cache:
            good = {file: (stamps[file], each) for file, each in checks.items() if each.problem is None}
            with contextlib.suppress(OSError):
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_text(cache, json.dumps({"format": _CACHE_FORMAT, "files": good}))
    return checks


def _stamp(path: Path) -> list[int]:
    """Size, times and inode: rewriting a file can set its date, but not when that was done."""
    try:
        status = path.stat()
    except OSError:  # a link to nothing, say; reading it fails too
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _load(cache: Path) -> dict[str, tuple[list[int], tuple[int, int, str | None]]]:
    """The stamp and the check of each file in `cache`; none where it is damaged or of another version."""
    try:
        stored = json.loads(cache.read_bytes())
        return dict(stored["files"]) if stored["format"] == _CACHE_FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
