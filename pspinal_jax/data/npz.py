"""Reading a data set from one .npz file; its headers are checked before anything is allocated."""

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
# NotImplementedError and RuntimeError: compressed in a way that Python cannot undo, and encrypted.
_DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError)


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
            held = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
            needed = [*ARRAYS, *(_VALIDATION if {*_VALIDATION} & {*held} else ())]
            if missing := [name for name in needed if name not in held]:
                raise DataError(f"{path} lacks {', '.join(missing)}; it has: {', '.join(held) or 'none'}")
            needed += [_NAMES] if _NAMES in held else []
            _check_headers(archive, needed)
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
    unused = sorted(set(held) - set(needed))
    if not unused:
        return data
    line = f"{path} holds arrays that are not used: {', '.join(unused)}; used are {', '.join(needed)}"
    if is_primary():
        warn(line)
    return dataclasses.replace(data, passed_over=(line,))


def _check_headers(archive: zipfile.ZipFile, names: list[str]) -> None:
    """Raise ValueError unless each array's header promises what follows it, and all fit into the memory."""
    total, memory = 0, math.inf
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in names:
        entry = archive.getinfo(f"{name}.npy")
        with archive.open(entry) as member:
            version = np.lib.format.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"{name} has a header of version {version}, expected a plain array of numbers or text")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
            promised, follow = math.prod(shape) * dtype.itemsize, entry.file_size - member.tell()
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are never unpickled; save plain numbers or text")
        if min(shape, default=0) < 0 or promised != follow:
            raise ValueError(f"{name} should have shape {shape} ({dtype}), {promised} bytes, but {follow} follow")
        total += promised
    if total > memory:
        raise ValueError(f"its arrays take {total} bytes, and this machine has {memory}")


def _class_names(path: Path, names: np.ndarray | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    try:
        if names.ndim == 1 and names.dtype.kind in "US":
            return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: class_names are bytes that are not UTF-8 ({error}); save them as text") from error
    raise DataError(
        f"{path}: class_names have shape {names.shape} and dtype {names.dtype}, expected text, one name a class, [C]"
    )
