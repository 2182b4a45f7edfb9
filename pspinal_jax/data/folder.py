"""A folder of images: a folder per class, with or without folders per split above them, or a table of their labels.

Every image is decoded once; what was found is remembered from one start to the next.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from pspinal_jax.data import near
from pspinal_jax.data.dataset import Dataset, cut_test, digest_files, first_names, joined_groups
from pspinal_jax.data.images import Encoded, Files, ImageSplit, is_image, list_images
from pspinal_jax.data.tables import LABEL_COLUMNS
from pspinal_jax.distributed import is_primary
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.files import cache_folder, expanded, read_bytes, write_text
from pspinal_jax.progress import progress_bar, say, warn

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}
"""Split -> names of its folder, in lower case."""

T = TypeVar("T")
_CHECK_SIZE = (32, 32)  # what `near.look` takes; every byte is decoded whatever the size
_CACHE_FORMAT = 5
_MAX_TABLE_BYTES = 2**28


def read_folder(
    path: Path,
    *,
    image_size: int,
    test_fraction: float,
    split_seed: int,
    strict: bool,
    keep_copies_together: bool = True,
    needs_test: bool = True,
    labels: Path | None = None,
    group: str | None = None,
    show_progress: bool = False,
) -> Dataset[ImageSplit]:
    """The images below `path`, in folders that bear the classes' names, or as the table `labels` says.

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
      labels: a table, see `DataConfig.labels`.
      group: what lies on one side of a cut, see `DataConfig.group`.
      show_progress: whether to show a bar on standard error while decoding.

    Raises:
      UsageError: if `test_fraction` is needed and does not lie between 0 and 1, or `group` fits no image.
      DataError: if the table cannot be read or names several labels for an image, there are fewer than two classes (a
        folder that holds no image in any split is left out, with a warning), a class without a readable image in a
        split, splits whose classes differ, or, if `strict`, an image that cannot be decoded.
    """
    path = expanded(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give a folder of class folders")
    folders, of_table = {}, dict[str, str]()
    if labels is None:
        folders = find_split_folders(path) or {"all": ""}
        listed = {split: _list_classes(path, folder) for split, folder in folders.items()}
    else:
        listed, of_table = _read_labels(labels)
        folders = dict.fromkeys(listed, "")
    full = {name for classes in listed.values() for name, files in classes.items() if files}
    empty = sorted({name for classes in listed.values() for name in classes} - full)
    listed = {
        split: {name: files for name, files in classes.items() if name in full} for split, classes in listed.items()
    }
    where = {split: str(labels or path / folder) for split, folder in folders.items()}
    names = class_names(listed, where)
    if len(names) < 2:
        holds = f"{path} holds {len(names)} class folders with images in them"
        holds = holds if labels is None else f"{labels} has {len(names)} labels"
        raise DataError(f"{holds} ({', '.join(names)}), expected two or more")
    files = [file for classes in listed.values() for each in classes.values() for file in each]
    checks = check_files(path, files, show_progress)
    skipped = [file for file in files if checks[file].problem is not None]
    warn_of_skipped([f"{file} ({checks[file].problem})" for file in skipped], str(path), strict)
    parts = {}
    for split, classes in listed.items():
        good = {name: [file for file in each if checks[file].problem is None] for name, each in classes.items()}
        parts[split] = in_order(good, names, where[split])
    whole = [file for each, _ in parts.values() for file in each]
    looks = near.as_array(checks[file].look for file in whole)
    groups = _groups(group, whole, of_table, looks)
    if groups is not None and keep_copies_together:
        groups = joined_groups(
            groups, digest_files([checks[file].size for file in whole], [checks[file].crc for file in whole])
        )
    splits, first = {}, 0
    for split, (found, of_found) in parts.items():
        place, first = slice(first, first + len(found)), first + len(found)
        crcs, sizes = [checks[file].crc for file in found], [checks[file].size for file in found]
        of_split = None if groups is None else groups[place]
        splits[split] = ImageSplit(Files(path, found, crcs, sizes), of_found, groups=of_split, looks=looks[place])
    if labels is None:
        passed_over = _find_passed_over(path, folders, empty, frozenset(files))
    else:
        passed_over = _find_unlisted(path, labels, frozenset(files))
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


def _read_labels(table: Path) -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
    """Split -> class -> paths, as `table` lists them, all of split 'all' where it has no column of splits; and groups.

    Raises:
      DataError: if it cannot be read, lacks a column or a value, or gives an image several labels.
    """
    try:
        text = io.StringIO(read_bytes(table, _MAX_TABLE_BYTES).decode("utf-8-sig"), newline="")
        lines = csv.reader(text, delimiter="\t" if table.suffix.lower() == ".tsv" else ",", strict=True)
        columns = [name.strip().lower() for name in next(lines, ())]
        cells = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if line]
        rows = [(number, dict(zip(columns, line, strict=True))) for number, line in cells]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a table of labels: {error}") from error
    found = [name for name in LABEL_COLUMNS if name in columns]
    if "path" not in columns or len(found) != 1:
        raise DataError(
            f"{table} has the columns {', '.join(columns)}, expected path and label, and optionally split and group, "
            "with one label per image"
        )
    several = "one label an image is expected: images of several labels are not taken"
    listed: dict[str, dict[str, list[str]]] = {}
    seen, groups = dict[str, tuple[str, str]](), dict[str, str]()
    alone = {row[found[0]] for _, row in rows}
    spellings = {spelling: split for split, names in SPLIT_FOLDERS.items() for spelling in names}
    for number, row in rows:
        file, label = row["path"], row[found[0]]
        parts = [part.strip() for part in re.split("[;|]", label)]
        if len(parts) > 1 or ("," in label and {part.strip() for part in label.split(",")} <= alone):
            raise DataError(f"{table}: line {number} gives {file} the label {label!r}; {several}")
        split = spellings.get(row["split"].lower(), "") if "split" in columns else "all"
        if not file or not label or not split:
            what = "a path" if not file else "a label" if not label else "a split (train, validation or test)"
            raise DataError(f"{table}: line {number} lacks {what}")
        if seen.setdefault(file, (split, label)) != (split, label):
            raise DataError(f"{table}: line {number} gives {file} another label or split than a line before; {several}")
        listed.setdefault(split, {}).setdefault(label, []).append(file)
        groups[file] = row.get("group", "")
    if {*listed} not in ({"all"}, {"train", "test"}, {"train", "validation", "test"}):
        raise DataError(f"{table} has images of {', '.join(listed) or 'no split'}, expected train and test")
    for classes in listed.values():
        for label, files in classes.items():
            classes[label] = sorted(set(files))
    return listed, groups if any(groups.values()) else {}


def _find_unlisted(path: Path, table: Path, listed: frozenset[str]) -> tuple[str, ...]:
    """A line about the images in `path` that the table does not list, if there are any."""
    others = [file for file in list_images(path) if file not in listed]
    return (
        (f"{path}: left out {len(others)} pictures that {table} does not list: {first_names(others)}",)
        if others
        else ()
    )


def _groups(
    group: str | None, files: Sequence[str], of_table: Mapping[str, str], looks: np.ndarray
) -> np.ndarray | None:
    """Integers [N], equal for the `files` of one group, which `DataConfig.group` or a table says; None for no groups.

    Raises:
      UsageError: if it is not a regular expression, fits no file, or the table has groups of its own.
    """
    if group is None and not of_table:
        return None
    if group is not None and of_table:
        raise UsageError(f"data.group is {group}, expected None where the table of labels has a column group")
    if group == "near":
        return joined_groups(np.arange(len(files)), pairs=near.find_pairs(looks)[0])
    if group is None:
        keys = [of_table[file] for file in files]
    else:
        try:
            matches = [re.search(group, file) for file in files]
        except re.error as error:
            raise UsageError(f"data.group is {group!r}, expected near or a regular expression: {error}") from None
        keys = ["" if match is None else next(filter(None, match.groups()), match[0]) for match in matches]
        if not any(keys):
            raise UsageError(f"data.group is {group!r}, which matches none of {len(files)} paths, such as {files[0]}")
    if (missing := keys.count("")) and is_primary():
        say(f"{missing:,} of {len(keys):,} pictures match no group; each is a group of its own")
    return np.unique([f"={key}" if key else f"#{number}" for number, key in enumerate(keys)], return_inverse=True)[1]


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
        raise DataError(f"{line}; repair or remove them, or omit --data.strict")
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
    """An image decoded once: checksum and size of its bytes, why it cannot be used (None if it can), and its `look`."""

    crc: int
    size: int
    problem: str | None
    look: str = ""


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

    data, problem, look = b"", None, ""
    try:
        data = encoded[index]
        look = near.look(decode(data, _CHECK_SIZE))
    except (OSError, DataError) as error:
        problem = (getattr(error, "strerror", None) or str(error)).removeprefix("the image cannot be decoded: ")
    return Check(zlib.crc32(data), len(data), problem, look)


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


def _load(cache: Path) -> dict[str, tuple[list[int], tuple[int, int, str | None, str]]]:
    """The stamp and the check of each file in `cache`; none where it is damaged or of another version."""
    try:
        stored = json.loads(cache.read_bytes())
        return dict(stored["files"]) if stored["format"] == _CACHE_FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
