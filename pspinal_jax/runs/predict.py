"""`predict`: the classes that a run, or an export of one, gives images."""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pspinal_jax.data.decode import decode
from pspinal_jax.data.images import MAX_BYTES, list_images
from pspinal_jax.data.tables import read_rows
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.files import expanded, read_bytes
from pspinal_jax.progress import progress_bar
from pspinal_jax.recipes.schema import TABLES
from pspinal_jax.runs.classifier import Classifier, load_classifier

BATCH_SIZE = 32
_MOST_THREADS = 8
_BATCHES_AHEAD = 3
"""How many batches of images are decoded while the model is at work."""

Images = Any
"""Paths, Pillow images, arrays and frames, see `predict`."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
      path: the image's file, or a table's with the row's number after a colon; None for an array or a Pillow image.
      classes: (name, probability) of the most probable classes, most probable first; empty where there is an error.
      error: why it could not be read, or None.
    """

    path: Path | None
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(
    source: str | Path | Classifier,
    images: Images,
    top: int = 1,
    seed_index: int | None = None,
    show_progress: bool = False,
) -> list[Prediction]:
    """Classify images, or rows of features, with a run's selected parameters.

    Images are decoded by threads while the model works on those before. One program is compiled, for batches of one
    size, a power of two up to 32; the last one is padded. A classifier compiles for each such size once.

    Args:
      source: run directory, or an export: its directory or a file in it; or a loaded classifier.
      images: files of any format that Pillow reads, Pillow images, and arrays uint8 [H, W] or [H, W, C], C 1 or 3; or
        one array uint8 [N, H, W] or [N, H, W, C]. Each may have any size: it is resized to what the model sees.
        For a run that was trained on features, numbers [N, D] as an array or a frame, or tables by their paths.
      top: how many classes to name for each.
      seed_index: which of the run's seeds; by default the best on validation. An export has but one.
      show_progress: whether to show a bar on standard error when it takes long.

    Returns:
      A prediction an image or row, in their order; images that cannot be read have an error.

    Raises:
      UsageError: if `images`, `top` or `seed_index` are not as above.
      DataError: if features are not of numbers, or some are missing.
      RunError: if the run or the export cannot be read.
    """
    enable_compilation_cache()
    classifier = source if isinstance(source, Classifier) else load_classifier(expanded(source), seed_index)
    _check(classifier, top)
    each: Sequence[Path | Image.Image | None]
    each, rows = _rows(classifier, images) if len(classifier.input_shape) == 1 else (_each(images), None)
    size = min(BATCH_SIZE, 1 << (len(each) - 1).bit_length())
    predictions: list[Prediction] = []
    with (
        progress_bar(len(each), "predict", "image", show_progress, delay=1.0) as bar,
        contextlib.closing(
            _in_threads(lambda image: _read(image, classifier), each, _BATCHES_AHEAD * size)
            if rows is None
            else (row for row in rows)
        ) as inputs,
    ):
        for start in range(0, len(each), size):
            batch = each[start : start + size]
            predictions += _predict_batch(classifier, batch, [next(inputs) for _ in batch], size, top)
            bar.update(len(batch))
    return predictions


def find_images(given: Iterable[Path]) -> list[Path]:
    """The files `given` and, in place of a folder, what is named like an image in it and in the folders below, sorted.

    Raises:
      UsageError: if there is no such file in a folder.
    """
    found: list[Path] = []
    for path in map(expanded, given):
        if not path.is_dir():
            found.append(path)
            continue
        inside = list_images(path, linked=True)
        if not inside:
            raise UsageError(f"{path} holds no file that is named like an image, nor do the folders below it")
        found += [path / name for name in inside]
    return found


def _in_threads(function: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Generator[Any, None, None]:
    """`function(item)` of all items, in their order, computed by threads, `ahead` items ahead at most."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _rows(classifier: Classifier, given: Any) -> tuple[Sequence[Path | None], np.ndarray]:
    """What to call the rows of features in `given`, by their table and number, and the rows, float32 [N, D]."""
    width = classifier.input_shape[0]
    tables = [given] if isinstance(given, str | Path) else given
    if not (isinstance(tables, list | tuple) and tables and all(isinstance(each, str | Path) for each in tables)):
        rows = read_rows(given, classifier.columns, width)
        return [None] * len(rows), rows
    names, found = [], []
    for path in map(expanded, tables):
        if path.suffix.lower() not in TABLES:
            raise UsageError(
                f"{path} is no table ({', '.join(TABLES)}), but {classifier.source} was trained on features, "
                "not on images"
            )
        found.append(read_rows(path, classifier.columns, width))
        names += [Path(f"{path}:{row}") for row in range(len(found[-1]))]
    return names, np.concatenate(found)


def _each(images: Images) -> list[Path | Image.Image]:
    """One image after the other; UsageError if something among them is none."""
    if isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "UO":
        images = images.tolist()
    one = isinstance(images, str | Path | Image.Image) or hasattr(images, "columns")
    if one or (
        isinstance(images, np.ndarray) and (images.ndim < 3 or (images.ndim == 3 and images.shape[2] in (1, 3)))
    ):
        what = f"an array {list(images.shape)}" if isinstance(images, np.ndarray) else f"{images!r:.100}"
        raise UsageError(f"images is {what}, expected several images; put one image into a list")
    return [_opened(image) for image in images]


def _opened(image: Any) -> Path | Image.Image:
    if isinstance(image, str | Path):
        return expanded(image)
    if isinstance(image, Image.Image):
        return image
    if np.ma.is_masked(image):
        raise UsageError("an image is an array of which pixels are masked, expected all of them; fill them in")
    array = np.asarray(image)
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or not array.size or not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise UsageError(
            f"an image is an array {array.dtype} {list(array.shape)}, expected uint8 [H, W], [H, W, 1] or [H, W, 3]"
        )
    return Image.fromarray(array.reshape(array.shape[:2]) if grey else array)


def _check(classifier: Classifier, top: int) -> None:
    source, shape = classifier.source, classifier.input_shape
    if len(shape) == 3 and shape[2] not in (1, 3):
        raise UsageError(f"{source} was trained on images of {shape[2]} channels; predict takes grey and colour images")
    if not 1 <= top <= len(classifier.class_names):
        raise UsageError(f"--top is {top}, expected 1 .. {len(classifier.class_names)}, the number of classes")


def _predict_batch(
    classifier: Classifier,
    images: Sequence[Path | Image.Image | None],
    inputs: Sequence[np.ndarray | str],
    size: int,
    top: int,
) -> list[Prediction]:
    """Predictions of `images`, which were read as `inputs`, computed as one batch of `size`."""
    batch = np.zeros((size, *classifier.input_shape), classifier.input_dtype)
    for index, pixels in enumerate(inputs):
        if isinstance(pixels, np.ndarray):
            batch[index] = pixels
    rows = np.exp(classifier.log_probabilities(batch))
    predictions = []
    for image, pixels, row in zip(images, inputs, rows, strict=False):
        path = image if isinstance(image, Path) else None
        if isinstance(pixels, str):
            predictions.append(Prediction(path, error=pixels))
            continue
        best = np.argsort(-row, kind="stable")[:top]
        named = tuple((classifier.class_names[index], float(row[index])) for index in best)
        predictions.append(Prediction(path, named))
    return predictions


def _read(image: Path | Image.Image, classifier: Classifier) -> np.ndarray | str:
    """The image as the model sees it, or why it cannot be read."""
    shape = classifier.input_shape
    try:
        content = read_bytes(image, MAX_BYTES) if isinstance(image, Path) else image
        pixels = decode(content, (shape[0], shape[1]), classifier.fit)
    except OSError as error:
        return error.strerror or str(error)
    except DataError as error:
        return str(error)
    if shape[2] == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    return pixels.swapaxes(0, 1) if classifier.transposed else pixels
