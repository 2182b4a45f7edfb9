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
            wanted = _wanted(path, held)
            _check_headers(archive, wanted)
        # Never unpickle: object arrays are refused by allow_pickle=False, the default.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in wanted}
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist; give --data.path an .npz, .csv or .parquet file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read as an .npz file: {error.strerror or error}") from error
    # NotImplementedError and RuntimeError: compressed in a way that Python cannot undo, and encrypted.
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read as an .npz file: {' '.join(str(error).split())}") from error
    splits = {
        name: (arrays[f"{name}_images"], arrays[f"{name}_labels"])
        for name in ("train", "validation", "test")
        if f"{name}_images" in arrays
    }
    data = make_dataset(splits, str(path), classes, _class_names(path, arrays.get(_NAMES)))
    unused = sorted(set(held) - set(wanted))
    if not unused:
        return data
    line = f"{path} holds arrays that are not used: {', '.join(unused)}; used are {', '.join(wanted)}"
    if is_primary():
        warn(line)
    return dataclasses.replace(data, passed_over=(line,))


def _wanted(path: Path, held: list[str]) -> list[str]:
    """The names of the arrays to read."""
    missing = [name for name in ARRAYS if name not in held]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; it has: {', '.join(held) or 'none'}")
    validation = [name for name in _VALIDATION if name in held]
    if len(validation) == 1:
        other = next(name for name in _VALIDATION if name not in held)
        raise DataError(f"{path} holds {validation[0]} but no {other}")
    return [*ARRAYS, *validation, *([_NAMES] if _NAMES in held else [])]


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
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise DataError(
            f"{path}: class_names have shape {names.shape} and dtype {names.dtype}, expected text, one name a class, "
            "[C]; save them as np.array([...], dtype=str)"
        )
    try:
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: class_names are bytes that are no UTF-8 ({error}); save them as text") from error
