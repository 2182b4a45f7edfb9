"""A folder of images: a folder per class, with or without folders per split above them."""

import contextlib
import os
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from pspinal_jax.data.dataset import Dataset, split_by_class
from pspinal_jax.data.images.checks import check_files, skipped_text, warn_of_skipped, with_reason
from pspinal_jax.data.images.classes import class_names, first_names, in_order
from pspinal_jax.data.images.encoded import Files, ImageSplit, is_image, list_images
from pspinal_jax.distributed import is_primary
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.files import expanded
from pspinal_jax.progress import warn

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}
"""Split -> names of its folder, in lower case."""


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
    valid, val), in any case. Every image is decoded once; see `check_files` for how that is remembered.

    Args:
      path: the folder.
      image_size: side in pixels of what a model sees.
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
        raise DataError(f"{path} does not exist or is no folder; give a folder of class folders")
    folders = find_split_folders(path) or {"all": ""}
    listed = {split: list_classes(path, folder) for split, folder in folders.items()}
    empty = [name for name in sorted({*chain(*listed.values())}) if not any(each.get(name) for each in listed.values())]
    for classes in listed.values():
        for name in empty:
            classes.pop(name, None)
    names = _class_names(path, folders, listed)
    files = [file for classes in listed.values() for each in classes.values() for file in each]
    checks = check_files(path, files, show_progress)
    skipped = tuple(file for file in files if checks[file].problem is not None)
    reasons = {file: with_reason(file, str(checks[file].problem)) for file in skipped}
    if skipped and strict:
        text = skipped_text([*reasons.values()], str(path))
        raise DataError(f"{text}; mend or remove them, or do not ask for strictness")
    splits = {}
    for split, classes in listed.items():
        good = {name: [file for file in each if checks[file].problem is None] for name, each in classes.items()}
        why = {name: first_names([reasons[file] for file in each if file in reasons]) for name, each in classes.items()}
        found, labels = in_order(good, names, partial(_nothing_in, path / folders[split], why))
        crcs, sizes = [checks[file].crc for file in found], [checks[file].stamp[0] for file in found]
        splits[split] = ImageSplit(Files(path, found, crcs, sizes), labels)
    warn_of_skipped([*reasons.values()], str(path))
    passed_over = find_passed_over(path, folders, frozenset(files))
    if empty:
        text = f"{len(empty)} class folder{_s(empty)} without an image left out"
        passed_over = (f"{text}: {first_names(empty)}", *passed_over)
    for line in passed_over if is_primary() else ():
        warn(line)
    uncut = splits.get("all")
    if uncut is not None:
        splits = _draw_test(uncut, test_fraction, split_seed, keep_copies_together)
        if needs_test and not len(splits["test"]):
            raise DataError(
                f"{path} has too few images to test on {test_fraction} of each class; choose a larger fraction"
            )
    shape = (image_size, image_size, 3)
    return Dataset(splits, names, str(path), shape, skipped=skipped, passed_over=passed_over, uncut=uncut)


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
    trains = "train" in found and bool(_folders(path / found["train"]))
    if trains or (1 < len(found) == len(names) and all(_folders(path / name) for name in names)):
        has, lacks = (found["train"], "test") if trains else (" and ".join(found.values()), "train")
        raise DataError(
            f"{path} holds {has} but no folder named {lacks}; a folder of splits needs both{_to_give(path)}"
        )
    return {}


def list_classes(path: Path, folder: str) -> dict[str, list[str]]:
    """Class -> its files that are named like images, of a split's `folder` in `path` or of `path` itself with "".

    The files are sorted paths relative to `path` with '/' in them.
    """
    prefix = f"{folder}/" if folder else ""
    return {
        name: [f"{prefix}{name}/{file}" for file in list_images(path / folder / name)]
        for name in _folders(path / folder)
    }


def find_passed_over(path: Path, folders: dict[str, str], taken: frozenset[str]) -> tuple[str, ...]:
    """A line for each kind of thing in `path` that holds no example of any split, though a user may think that it does.

    Hidden files are nobody's examples, and neither are files of text beside the folders.
    """
    lines = []
    inside = sorted(folder for folder in folders.values() if folder)
    beside = [name for name in _folders(path) if name not in inside] if inside else []
    if beside:
        lines.append(f"{path} is read as {', '.join(inside)}; left out: the folder{_s(beside)} {first_names(beside)}")
    roots = [path / folder for folder in inside] or [path]
    loose = [file.relative_to(path).as_posix() for root in roots for file in sorted(root.iterdir()) if _is_loose(file)]
    if loose:
        text = f"{len(loose)} picture{_s(loose)} beside the class folders, in no class, left out"
        lines.append(f"{text}: {first_names(loose)}")
    classes = [root / name for root in roots for name in _folders(root)]
    links, others = _inside_classes(classes, taken, path)
    if links:
        text = f"{len(links)} linked folder{_s(links)} inside a class left out, for links are not followed"
        lines.append(f"{text}: {first_names(links)}")
    if others:
        suffixes = ", ".join(sorted({os.path.splitext(file)[1] or "without a suffix" for file in others}))
        text = f"{len(others)} file{_s(others)} in class folders left out for their suffix ({suffixes})"
        lines.append(f"{text}: {first_names(others)}")
    return tuple(lines)


def _s(names: Sequence[str]) -> str:
    return "s" if len(names) > 1 else ""


def _is_loose(file: Path) -> bool:
    return is_image(file.name) and not file.is_dir()


def _inside_classes(classes: list[Path], taken: frozenset[str], root: Path) -> tuple[list[str], list[str]]:
    """Linked folders below `classes`, and files that were not taken, both relative to `root`."""
    links, others = [], []
    for each in classes:
        for folder, inner, files in os.walk(each):
            inner[:] = [name for name in inner if not name.startswith(".")]
            here = Path(folder).relative_to(root)
            links += [(here / name).as_posix() for name in inner if os.path.islink(os.path.join(folder, name))]
            names = ((here / name).as_posix() for name in files if not name.startswith("."))
            others += [name for name in names if name not in taken]
    return sorted(links), sorted(others)


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_dir())


def _class_names(path: Path, folders: dict[str, str], listed: dict[str, dict[str, list[str]]]) -> tuple[str, ...]:
    names = class_names(
        listed,
        lambda split, missing: (
            f"{path / folders[split]} lacks the class{'es' if ',' in missing else ''} {missing} that another split "
            "has; every split needs a folder of each class"
        ),
    )
    if len(names) < 2:
        many = f"{len(names)} class folder{'s' if len(names) != 1 else ''}"
        raise DataError(f"{path} holds {many}, expected two or more{_to_give(path)}")
    return names


def _nothing_in(folder: Path, why: dict[str, str], name: str) -> str:
    reason = f" ({why[name]})" if why[name] else ""
    return f"{folder / name} holds no image that can be decoded{reason}; fill or remove it"


def _to_give(path: Path) -> str:
    """What lies one folder below `path` and could be read in its place, as an advice; nothing where nothing does."""
    for name in sorted(_folders(path), key=lambda name: -len(_folders(path / name))):
        with contextlib.suppress(DataError):
            splits, inner = find_split_folders(path / name), _folders(path / name)
            holds = f"the splits {', '.join(splits.values())}" if splits else f"{len(inner)} classes"
            if len(inner) > 1:
                return f"; {path / name} holds {holds}: give that"
    return ""


def _draw_test(images: ImageSplit, fraction: float, seed: int, together: bool) -> dict[str, ImageSplit]:
    if not 0 < fraction < 1:
        raise UsageError(f"the test fraction is {fraction}, expected 0 < fraction < 1")
    copies = images.digests if together else None
    train, test = split_by_class(images.labels, fraction, seed, copies)
    return {"train": images.take(train), "test": images.take(test)}
