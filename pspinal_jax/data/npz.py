"""Reading a data set from one .npz file."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from pspinal_jax.data.dataset import ArraySplit, Dataset, make_dataset
from pspinal_jax.errors import DataError

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def read_npz(path: Path, num_classes: int | None) -> Dataset[ArraySplit]:
    """The data set in `path`: train_images, train_labels, test_images, test_labels; class_names and validation_images
    and validation_labels if it has them.

    Images are uint8 [N, H, W] or [N, H, W, C]; 2-D float arrays are features [N, D].

    Raises:
      DataError: if the file is missing, unreadable, lacks an array or holds arrays that do not fit.
    """
    try:
        # Never unpickle: object arrays are refused by allow_pickle=False, the default.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is a single array, expected an .npz file with {', '.join(ARRAYS)}")
            missing = [name for name in ARRAYS if name not in archive.files]
            if missing:
                found = ", ".join(archive.files) or "none"
                raise DataError(f"{path} lacks {', '.join(missing)}; it has: {found}")
            splits = {
                name: (archive[f"{name}_images"], archive[f"{name}_labels"])
                for name in ("train", "validation", "test")
                if f"{name}_images" in archive.files
            }
            names = archive["class_names"] if "class_names" in archive.files else None
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist; give --data.path an .npz file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise DataError(f"{path} cannot be read as an .npz file: {error}") from error
    if names is not None and names.ndim != 1:
        raise DataError(f"{path}: class_names have shape {names.shape}, expected one name a class, [C]")
    class_names = None if names is None else tuple(map(str, names.tolist()))
    return make_dataset(splits, str(path), num_classes, class_names)
