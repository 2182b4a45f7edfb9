"""Reading a data set from one .npz file."""

import dataclasses
import math
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from pspinal_jax.data.dataset import ArraySplit, Dataset
from pspinal_jax.data.tables import Classes, make_dataset
from pspinal_jax.distributed import is_primary
from pspinal_jax.errors import DataError
from pspinal_jax.files import require_file
from pspinal_jax.progress import warn

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_VALIDATION = ("validation_images", "validation_labels")
_NAMES = "class_names"
# RuntimeError: compressed in a way that Python cannot undo, or encrypted. MemoryError: a header that promises too much.
_DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError, MemoryError)


def read_npz(path: Path, classes: Classes) -> Dataset[ArraySplit]:
    """The data set in `path`: train_images, train_labels, test_images, test_labels; class_names and validation_images
    and validation_labels if it has them. Other arrays are left out, and a warning names them.

    Images are uint8 [N, H, W] or [N, H, W, C]; 2-D arrays of numbers are features [N, D]; class_names are text [C].
    For labels and `classes` see `make_dataset`.

    Raises:
      DataError: if the file is missing, unreadable or larger than the memory, lacks an array or holds arrays that do
        not fit.
    """
    try:
        require_file(path)
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()}
        needed = [*ARRAYS, *(_VALIDATION if {*_VALIDATION} & {*sizes} else ())]
        if missing := [name for name in needed if name not in sizes]:
            raise DataError(f"{path} lacks {', '.join(missing)}; it has: {', '.join(sizes) or 'none'}")
        needed += [_NAMES] if _NAMES in sizes else []
        if (total := sum(sizes[name] for name in needed)) > (memory := _memory()):
            raise ValueError(f"its arrays take {total} bytes, and this machine has {memory}")
        # Never unpickle: object arrays are refused by allow_pickle=False, the default.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in needed}
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as an .npz file: {reason}") from error
    splits = {
        name: (arrays[f"{name}_images"], arrays[f"{name}_labels"])
        for name in ("train", "validation", "test")
        if f"{name}_images" in arrays
    }
    data = make_dataset(splits, str(path), classes, _class_names(path, arrays.get(_NAMES)))
    unused = sorted(set(sizes) - set(needed))
    if not unused:
        return data
    line = f"{path} holds arrays that are not used: {', '.join(unused)}; used are {', '.join(needed)}"
    if is_primary():
        warn(line)
    return dataclasses.replace(data, passed_over=(line,))


def _memory() -> float:
    """Bytes of memory of this machine, infinity where that is not known."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def _class_names(path: Path, names: np.ndarray | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    names = np.asarray(names)  # NumPy gives the bytes of what is not an array
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise DataError(f"{path}: class_names have shape {names.shape} and dtype {names.dtype}, expected text [C]")
    try:
        return tuple(np.char.decode(names, "utf-8").tolist() if names.dtype.kind == "S" else names.tolist())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: class_names are bytes that are not UTF-8 ({error}); save them as text") from error
