"""Preparing a data set of the catalogue: from raw files, an .npz file or a download to array_record, all or nothing."""

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.catalogue import OUR_VERSION, DataSet
from pspinal_jax.data.download import check_reachable, download, missing_downloads
from pspinal_jax.data.idx import Arrays, read_raw
from pspinal_jax.data.images.checks import warn_of_skipped
from pspinal_jax.data.images.encoded import Examples
from pspinal_jax.data.images.published import read_published
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.prepared import check_name, default_data_dir, find_prepared, import_tfds
from pspinal_jax.data.stl10 import read_stl10
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.files import check_target, expanded, locked
from pspinal_jax.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Where a data set is prepared, and whether it was before."""

    directory: Path
    was_there: bool


def prepare_data_set(
    data_set: DataSet,
    data_dir: Path | None = None,
    raw: Path | None = None,
    npz: Path | None = None,
    show_progress: bool = False,
) -> Preparation:
    """Prepare `data_set` in `data_dir` unless it is there already.

    The directory appears by one rename once all is written: killed before that, nothing looks prepared, and the next
    call clears away what was left. Several processes may call at once: one prepares, the others wait for it.

    Args:
      data_set: an entry of the catalogue.
      data_dir: TFDS data folder; TFDS's own by default.
      raw: folder with the files as published; see `read_raw`, `read_stl10` and `read_published`.
      npz: in place of `raw`, an .npz file with train_images, train_labels, test_images and test_labels: images upright,
        labels from 0. With neither, the files are downloaded.
      show_progress: whether to show bars on standard error.

    Raises:
      UsageError: if `raw` or `npz` is given for a set that needs no files, or both are.
      DataError: if the files are missing, damaged, not reachable, or the folder cannot be written.
    """
    _check_sources(data_set, raw, npz)
    root = default_data_dir() if data_dir is None else expanded(data_dir)
    check_name(root)
    directory = root / data_set.name / OUR_VERSION
    was_there = directory.exists()  # asked first: another process may be about to finish it
    if there := find_prepared(root, data_set.name):
        return Preparation(there, was_there=True)
    if was_there:
        raise DataError(f"{directory} exists but is no complete data set; delete it and prepare again")
    check_target(root, "data folder", f"{data_set.name}/dataset_info.json")
    with contextlib.ExitStack() as archives:
        # All that can be wrong with the input is found before anything is written.
        examples = _read(data_set, raw, npz, archives, show_progress)
        downloads = root / "downloads" / "manual" / data_set.folder
        if examples is None:
            check_reachable(data_set, missing_downloads(data_set, downloads))
        try:
            with locked(root, f"preparing data in {root}") as held:
                if there := find_prepared(root, data_set.name):
                    return Preparation(there, was_there=True)
                if held:
                    _clear_leftovers(root / data_set.name, downloads)
                if examples is None:
                    download(data_set, missing_downloads(data_set, downloads), downloads, show_progress)
                    examples = _read_files(data_set, downloads, archives, show_progress)
                _write(data_set, root, examples, show_progress)
        except OSError as error:
            problem = f"{data_set.name} cannot be prepared in {root}: {error}; choose another data folder"
            raise DataError(problem) from error
    warn_of_skipped(examples.skipped, data_set.name)
    return Preparation(directory, was_there=False)


def _check_sources(data_set: DataSet, raw: Path | None, npz: Path | None) -> None:
    if raw is not None and npz is not None:
        raise UsageError("give --raw or --npz, not both")
    if not data_set.files and (raw is not None or npz is not None):
        raise UsageError(f"{data_set.name} comes with scikit-learn and takes neither --raw nor --npz")
    if data_set.in_folders and npz is not None:
        raise UsageError(f"{data_set.name} is made of images of different sizes and takes --raw, not --npz")


def _read(
    data_set: DataSet, raw: Path | None, npz: Path | None, archives: contextlib.ExitStack, show_progress: bool
) -> Examples | None:
    """The examples from what the user or scikit-learn gives; None if they have to be downloaded."""
    if not data_set.files:
        return Examples(read_digits(), data_set.class_names)
    if raw is not None:
        return _read_files(data_set, expanded(raw), archives, show_progress)
    if npz is not None:
        return Examples(_read_npz(data_set, expanded(npz)), data_set.class_names)
    if not data_set.downloads:
        raise DataError(
            f"{data_set.name} cannot be downloaded from here; get it ({data_set.origin}) and run: pspinal-jax prepare "
            f"{data_set.name} --raw DIR"
        )
    return None


def _read_files(data_set: DataSet, place: Path, archives: contextlib.ExitStack, show_progress: bool) -> Examples:
    if data_set.in_folders:
        return read_published(data_set, place, archives, show_progress)
    splits = read_stl10(data_set, place) if data_set.layout == "stl10" else read_raw(data_set, place)
    return Examples(splits | _cut_parts(data_set, splits), data_set.class_names)


def _read_npz(data_set: DataSet, path: Path) -> Arrays:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file; give --npz an .npz file")
    data = read_npz(path, data_set.num_classes)
    if data.example_shape != data_set.image_shape or data.example_dtype != "uint8":
        raise DataError(
            f"{path} holds {data.example_dtype} of shape {data.example_shape}, expected uint8 {data_set.image_shape}"
        )
    splits = {name: (data.splits[name].inputs, data.splits[name].labels) for name in ("train", "test")}
    return splits | _cut_parts(data_set, splits)


def _write(data_set: DataSet, root: Path, examples: Examples, show_progress: bool) -> None:
    from pspinal_jax.data.builder import make_builder

    total = sum(len(labels) for _, labels in examples.splits.values())
    tfds = import_tfds()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with progress_bar(total, f"prepare {data_set.name}", "image", show_progress) as bar:
        builder = make_builder(data_set, root, examples, bar.update)
        try:
            with _quiet(tfds):
                builder.download_and_prepare(file_format="array_record", download_config=config)
        except OSError:
            # Without locks, another process may have finished first: its folder is in place, and our rename fails.
            if find_prepared(root, data_set.name) is None:
                raise
        except RuntimeError as error:  # array_record's, of a full disk
            raise OSError(str(error)) from error
        finally:
            _remove_if_empty(root / data_set.name)


def _cut_parts(data_set: DataSet, splits: Arrays) -> Arrays:
    parts = {}
    for name, (split, start, end) in data_set.parts.items():
        images, labels = splits[split]
        parts[name] = (images[start:end], labels[start:end])
    # TFDS has no empty splits; one arises where a file holds fewer examples than the published one.
    return {name: arrays for name, arrays in parts.items() if len(arrays[1])}


def _clear_leftovers(directory: Path, downloads: Path) -> None:
    """Remove what killed processes were writing; only while holding the lock, and only our own version's folders."""
    for leftover in directory.glob(f"incomplete.*_{OUR_VERSION}"):
        shutil.rmtree(leftover)
    for leftover in downloads.glob("*.part"):
        leftover.unlink()


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


@contextlib.contextmanager
def _quiet(tfds: Any) -> Iterator[None]:
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


NUM_TEST_DIGITS = 360
_DIGIT_LEVELS = 16  # scikit-learn's grey levels go from 0 to 16


def read_digits() -> Arrays:
    """The 1,797 handwritten 8x8 digits (UCI) that ship with scikit-learn.

    Splits 'train' (1,437) and 'test' (360), drawn with seed 0; images uint8 [N, 8, 8, 1].
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / _DIGIT_LEVELS)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    parts = {"test": order[:NUM_TEST_DIGITS], "train": order[NUM_TEST_DIGITS:]}
    return {name: (images[part], labels[part]) for name, part in parts.items()}
