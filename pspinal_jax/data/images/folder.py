"""Pictures that lie in files."""

# DOC of data/photos/folder: """A folder of pictures, a folder per class, with or without folders per split above them."""  # noqa: E501

from pathlib import Path

import numpy as np

from pspinal_jax.data.images.checks import FileChecks, check_files, skipped_text, warn_of_skipped
from pspinal_jax.data.images.images import Files, ImageDataset, ImageSplit, list_pictures, split_by_class
from pspinal_jax.errors import DataError, UsageError

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}
"""Split -> names of its folder, in lower case."""
_NAMED = 5


def read_folder(
    path: Path, *, test_fraction: float, split_seed: int, strict: bool, show_progress: bool = False
) -> ImageDataset:
    """The pictures below `path`, in folders that bear the classes' names.

    Above the class folders there may be one for each split: train (or Training), test, and perhaps validation (or
    valid, val), in any case. Every picture is decoded once; see `check_files` for how that is remembered.

    Args:
      path: the folder.
      test_fraction: where there are no folders for splits, the share of each class that makes the test split.
      split_seed: decides that draw.
      strict: whether a picture that cannot be decoded is an error; otherwise it is left out, with a warning.
      show_progress: whether to show a bar on standard error while decoding.

    Raises:
      UsageError: if `test_fraction` is needed and does not lie between 0 and 1.
      DataError: if there are fewer than two classes, a class without a readable picture, splits whose classes differ,
        or, if `strict`, a picture that cannot be decoded.
    """
    path = path.expanduser()
    if not path.is_dir():
        raise DataError(f"{path} does not exist or is no folder; give a folder of class folders")
    folders = find_split_folders(path)
    listed = {split: list_classes(path / folder) for split, folder in (folders or {"all": "."}).items()}
    class_names = _class_names(path, folders, listed)
    prefixes = {split: f"{folder}/" for split, folder in folders.items()} or {"all": ""}
    files = [
        f"{prefixes[split]}{file}" for split, classes in listed.items() for each in classes.values() for file in each
    ]
    checks = check_files(path, files, show_progress)
    skipped = tuple(file for file in files if checks[file].problem is not None)
    if skipped and strict:
        raise DataError(f"{skipped_text(skipped, str(path))}; mend or remove them, or do not ask for strictness")
    splits = {
        split: _make_split(path, prefixes[split], classes, class_names, checks) for split, classes in listed.items()
    }
    warn_of_skipped(skipped, str(path))
    if folders:
        train, test, validation = splits["train"], splits["test"], splits.get("validation")
    else:
        train, test = _cut(path, splits["all"], test_fraction, split_seed)
        validation = None
    return ImageDataset(train, validation, test, class_names, str(path), skipped)


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
    # A class may be called train; but then it holds pictures, not folders.
    if "train" in found and _folders(path / found["train"]):
        raise DataError(f"{path} holds {found['train']} but no folder named test; a folder of splits needs both")
    return {}


def list_classes(path: Path) -> dict[str, list[str]]:
    """Class -> its files that are named like pictures, sorted paths relative to `path` with '/' in them."""
    return {name: [f"{name}/{file}" for file in list_pictures(path / name)] for name in _folders(path)}


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_dir())


def _class_names(path: Path, folders: dict[str, str], listed: dict[str, dict[str, list[str]]]) -> tuple[str, ...]:
    everything = sorted({name for classes in listed.values() for name in classes})
    for split, classes in listed.items():
        missing = [name for name in everything if name not in classes]
        if missing:
            first = ", ".join(missing[:_NAMED]) + (", .." if len(missing) > _NAMED else "")
            raise DataError(
                f"{path / folders[split]} lacks the class{'es' if len(missing) > 1 else ''} {first} that another split "
                "has; every split needs a folder of each class"
            )
    if len(everything) < 2:
        raise DataError(
            f"{path} holds {len(everything)} class folder{'s' if len(everything) != 1 else ''}, expected two or more"
        )
    return tuple(everything)


def _make_split(
    path: Path, prefix: str, classes: dict[str, list[str]], class_names: tuple[str, ...], checks: FileChecks
) -> ImageSplit:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        readable = [prefix + file for file in classes[name] if checks[prefix + file].problem is None]
        if not readable:
            raise DataError(f"{path / (prefix + name)} holds no picture that can be decoded; fill or remove it")
        files += readable
        labels += [label] * len(readable)
    return ImageSplit(Files(path, files, [checks[file].crc for file in files]), np.asarray(labels, np.int32))


def _cut(path: Path, photos: ImageSplit, fraction: float, seed: int) -> tuple[ImageSplit, ImageSplit]:
    if not 0 < fraction < 1:
        raise UsageError(f"the test fraction is {fraction}, expected 0 < fraction < 1")
    kept, drawn = split_by_class(photos.labels, fraction, seed)
    if not len(drawn):
        raise DataError(f"{path} has too few pictures to test on {fraction} of each class; choose a larger fraction")
    return photos.take(kept), photos.take(drawn)
