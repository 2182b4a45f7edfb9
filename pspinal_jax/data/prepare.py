"""Preparing a data set of the catalogue: from raw files, an .npz file or a download to array_record, all or nothing."""

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pspinal_jax.data.catalogue import OUR_VERSION, DataSet, Download
from pspinal_jax.data.dataset import ArraySplit, Dataset, Split, array_dataset
from pspinal_jax.data.folder import warn_of_skipped
from pspinal_jax.data.images import ImageSplit
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.raw import read_raw
from pspinal_jax.data.tfds import check_name, default_data_dir, find_prepared, import_tfds
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.files import check_target, expanded, locked
from pspinal_jax.network import problem_reaching
from pspinal_jax.progress import progress_bar

NUM_TEST_DIGITS = 360
_DIGIT_LEVELS = 16  # scikit-learn's grey levels go from 0 to 16
_SECONDS_TO_ANSWER = 4.0
_SECONDS_WITHOUT_DATA = 20.0
_CHUNK = 1 << 18


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
      raw: folder with the files as published, or their archive; see `read_raw`.
      npz: in place of `raw`, an .npz file with train_images, train_labels, test_images and test_labels: images upright,
        labels from 0. With neither, the files are downloaded.
      show_progress: whether to show bars on standard error.

    Raises:
      UsageError: if `raw` or `npz` is given for a set that needs no files, or both are.
      DataError: if the files are missing, damaged, not reachable, or the folder cannot be written.
    """
    if raw is not None and npz is not None:
        raise UsageError("give --raw or --npz, not both")
    given = raw is not None or npz is not None
    if given and not data_set.files:
        raise UsageError(f"{data_set.name} comes with scikit-learn and takes neither --raw nor --npz")
    if npz is not None and data_set.in_folders:
        raise UsageError(f"{data_set.name} is made of images of different sizes and takes --raw, not --npz")
    root = default_data_dir() if data_dir is None else expanded(data_dir)
    check_name(root)
    directory = root / data_set.name / OUR_VERSION
    was_there = directory.exists()  # asked first: another process may be about to finish it
    if prepared := find_prepared(root, data_set.name):
        return Preparation(prepared, was_there=True)
    if was_there:
        raise DataError(f"{directory} exists but is not a complete data set; delete it and prepare again")
    check_target(root, "data folder", f"{data_set.name}/dataset_info.json")
    with contextlib.ExitStack() as archives:
        # All that can be wrong with the input is found before anything is written.
        downloads, data = root / "downloads" / "manual" / (data_set.folder or data_set.name), None
        if given or not data_set.files:
            data = _read(data_set, raw, npz, archives, show_progress)
        elif not data_set.downloads:
            raise DataError(
                f"{data_set.name} cannot be downloaded; get it ({data_set.origin}) and run: pspinal-jax prepare "
                f"{data_set.name} --raw DIR"
            )
        elif missing := _missing(data_set, downloads):
            problem = problem_reaching(missing[0].url, _SECONDS_TO_ANSWER)
            if problem is not None:
                raise _unreachable(data_set, missing[0], str(problem))
        try:
            with locked(root, f"preparing data in {root}") as held:
                if prepared := find_prepared(root, data_set.name):
                    return Preparation(prepared, was_there=True)
                if held:
                    _clear_leftovers(root / data_set.name, downloads)
                if data is None:
                    _download(data_set, downloads, show_progress)
                    data = _read(data_set, downloads, None, archives, show_progress)
                _write(data_set, root, data, show_progress)
        except OSError as error:
            problem_text = f"{data_set.name} cannot be prepared in {root}: {error}; choose another data folder"
            raise DataError(problem_text) from error
    warn_of_skipped(data.skipped, data_set.name)
    return Preparation(directory, was_there=False)


def read_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The 1,797 handwritten 8x8 digits (UCI) that ship with scikit-learn.

    Splits 'train' (1,437) and 'test' (360), drawn with seed 0; images uint8 [N, 8, 8, 1], labels int32 [N].
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / _DIGIT_LEVELS)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    parts = {"test": order[:NUM_TEST_DIGITS], "train": order[NUM_TEST_DIGITS:]}
    return {name: (images[part], labels[part]) for name, part in parts.items()}


def _read(
    data_set: DataSet, raw: Path | None, npz: Path | None, archives: contextlib.ExitStack, show_progress: bool
) -> Dataset[Any]:
    """The examples from files as published, an .npz file or scikit-learn, with the parts that are splits too."""
    if raw is not None:
        data: Dataset[Any] = read_raw(data_set, expanded(raw), archives, show_progress)
    elif npz is not None:
        read = read_npz(expanded(npz), data_set.num_classes)
        if read.example_shape != data_set.image_shape or read.example_dtype != "uint8":
            raise DataError(
                f"{npz} holds {read.example_dtype} of shape {read.example_shape}, expected uint8 {data_set.image_shape}"
            )
        splits = {name: read.splits[name] for name in ("train", "test")}
        data = array_dataset(splits, data_set.class_names, read.source)
    else:
        splits = {name: ArraySplit(*arrays) for name, arrays in read_digits().items()}
        data = array_dataset(splits, data_set.class_names, data_set.name)
    parts = {}
    for name, part in data_set.parts.items():
        whole = data.splits[part["split"]]
        indices = np.arange(len(whole))[part["start"] : part.get("end")]
        # TFDS has no empty splits; one arises where a file holds fewer examples than the published one.
        if len(indices):
            parts[name] = whole.take(indices)
    return dataclasses.replace(data, splits={**data.splits, **parts})


def _missing(data_set: DataSet, folder: Path) -> list[Download]:
    """The downloads that do not lie in `folder`, whole and unchanged."""
    import pooch

    def is_whole(path: Path, item: Download) -> bool:
        return path.is_file() and bool(pooch.file_hash(path) == item.sha256)

    return [item for item in data_set.downloads if not is_whole(folder / item.file, item)]


def _download(data_set: DataSet, folder: Path, show_progress: bool) -> None:
    """Fetch what is missing in `folder`; a file appears there only once it is whole and its checksum is right."""
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")
    for item in _missing(data_set, folder):
        with progress_bar(item.num_bytes, f"download {item.file}", "B", show_progress) as bar:

            def fetch(url: str, path: str, _: Any, bar: Any = bar) -> None:  # pooch's own leaves the connection open
                plain = {"Accept-Encoding": "identity"}  # or a .gz could be unpacked on the way
                with (
                    requests.get(url, stream=True, timeout=_SECONDS_WITHOUT_DATA, headers=plain) as response,
                    open(path, "wb") as file,
                ):
                    response.raise_for_status()
                    for chunk in response.iter_content(_CHUNK):
                        bar.update(file.write(chunk))

            try:
                pooch.retrieve(item.url, f"sha256:{item.sha256}", item.file, folder, downloader=fetch)
            except (requests.RequestException, ValueError) as error:
                raise _unreachable(data_set, item, " ".join(str(error).split())) from error


def _unreachable(data_set: DataSet, item: Download, problem: str) -> DataError:
    names = ", ".join(other.file for other in data_set.downloads)
    return DataError(
        f"{data_set.name}: {item.file} is missing and cannot be fetched from {urlsplit(item.url).netloc} "
        f"({problem}); put {names} into a folder DIR and run: pspinal-jax prepare {data_set.name} --raw DIR"
    )


def _clear_leftovers(directory: Path, downloads: Path) -> None:
    """Remove the partial files of killed processes; only while holding the lock, and only our own version's folders."""
    for leftover in directory.glob(f"incomplete.*_{OUR_VERSION}"):
        shutil.rmtree(leftover)
    for leftover in downloads.glob("tmp*"):
        leftover.unlink()


def _write(data_set: DataSet, root: Path, data: Dataset[Split], show_progress: bool) -> None:
    tfds = import_tfds()
    total = sum(len(split) for split in data.splits.values())
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with progress_bar(total, f"prepare {data_set.name}", "image", show_progress) as bar:
        builder = _make_builder(data_set, root, data, bar.update)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                tfds.disable_progress_bar()
                builder.download_and_prepare(file_format="array_record", download_config=config)
        except OSError:
            # Without locks, another process may have finished first: its folder is in place, and our rename fails.
            if find_prepared(root, data_set.name) is None:
                raise
        except RuntimeError as error:  # array_record's, of a full disk
            raise OSError(str(error)) from error
        finally:
            tfds.enable_progress_bar()
            with contextlib.suppress(OSError):
                (root / data_set.name).rmdir()  # if it is empty


def _make_builder(data_set: DataSet, root: Path, data: Dataset[Split], on_example: Callable[[], object]) -> Any:
    """The TFDS builder that writes `data`: arrays are stored as PNG, encoded images as they are."""
    tfds = import_tfds()

    # TFDS takes a data set's name from the builder's class, hence a class per set. It stays out of TFDS's registry,
    # where mnist and others already are.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg,name-defined]
        name = data_set.name
        VERSION = tfds.core.Version(OUR_VERSION)
        RELEASE_NOTES = {OUR_VERSION: "First version."}

        def _info(self) -> Any:
            encoding = "jpeg" if data_set.in_folders else "png"
            features = {
                "image": tfds.features.Image(shape=data_set.image_shape, encoding_format=encoding),
                "label": tfds.features.ClassLabel(names=list(data.class_names)),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=data_set.keep_order,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {name: self._generate_examples(split) for name, split in data.splits.items()}

        def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, label in enumerate(split.labels):
                yield index, {"image": _stored_image(split, index), "label": int(label)}
                on_example()

    return Builder(data_dir=str(root), file_format="array_record")


def _stored_image(split: Split, index: int) -> Any:
    from PIL import Image  # `prepare --help` has no need of it

    if isinstance(split, ImageSplit):
        return split.encoded[index]
    image = split.read(index, (0, 0))
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
