"""`predict`: the classes that a run, or an export of one, gives images."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pspinal_jax.data.images.decode import decode
from pspinal_jax.data.images.encoded import MOST_BYTES
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import DataError, RunError, UsageError
from pspinal_jax.export.directory import is_export, read_export
from pspinal_jax.files import expanded, read_bytes
from pspinal_jax.models.build import build_model
from pspinal_jax.runs.restore import load_recipe_of, load_variables

BATCH_SIZE = 32

Images = Sequence[str | Path | Image.Image | np.ndarray] | np.ndarray
"""Paths, Pillow images and arrays, see `predict`."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
      path: the image's file; None for an array or a Pillow image.
      classes: (name, probability) of the most probable classes, most probable first; empty where there is an error.
      error: why it could not be read, or None.
    """

    path: Path | None
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class _Classifier:
    """What predicting needs of a run or an export."""

    source: Path
    class_names: list[str]
    shape: tuple[int, ...]
    dtype: str
    probabilities: Callable[[Any], Any]
    transposed: bool = False


def predict(source: str | Path, images: Images, top: int = 1, seed_index: int | None = None) -> list[Prediction]:
    """Classify images with a run's selected parameters.

    Args:
      source: run directory, or the directory of an export.
      images: files of any format that Pillow reads, Pillow images, and arrays uint8 [H, W] or [H, W, C], C 1 or 3; or
        one array uint8 [N, H, W] or [N, H, W, C]. Each may have any size: it is resized to what the model sees.
      top: how many classes to name for each.
      seed_index: which of the run's seeds; by default the best on validation. An export has but one.

    Returns:
      A prediction an image, in their order; files that cannot be read have an error.

    Raises:
      UsageError: if `images`, `top` or `seed_index` are not as above, or `source` does not classify images.
      RunError: if the run or the export cannot be read.
    """
    enable_compilation_cache()
    source = expanded(source)
    each = _each(images)
    if is_export(source):
        if seed_index is not None:
            raise UsageError(f"--seed-index is {seed_index}, but {source} is an export, of one seed; leave it out")
        classifier = _of_export(source)
    else:
        classifier = _of_run(source, seed_index)
    _check(classifier, top)
    predictions: list[Prediction] = []
    for start in range(0, len(each), BATCH_SIZE):
        predictions += _predict_batch(classifier, each[start : start + BATCH_SIZE], min(BATCH_SIZE, len(each)), top)
    return predictions


def _each(images: Images) -> list[Path | Image.Image]:
    """One image after the other; UsageError if something among them is none."""
    one = isinstance(images, str | Path | Image.Image)
    if one or (
        isinstance(images, np.ndarray) and (images.ndim < 3 or (images.ndim == 3 and images.shape[2] in (1, 3)))
    ):
        what = f"an array {list(images.shape)}" if isinstance(images, np.ndarray) else repr(images)
        raise UsageError(f"images is {what}, expected several images; put one image into a list")
    return [_opened(image) for image in images]


def _opened(image: Any) -> Path | Image.Image:
    if isinstance(image, str | Path):
        return expanded(image)
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or not array.size or not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise UsageError(
            f"an image is an array {array.dtype} {list(array.shape)}, expected uint8 [H, W], [H, W, 1] or [H, W, 3]"
        )
    return Image.fromarray(array.reshape(array.shape[:2]) if grey else array)


def _of_run(run: Path, seed_index: int | None) -> _Classifier:
    variables, config = load_variables(run, seed_index)
    recipe, names, shape = load_recipe_of(config), config["class_names"], tuple(config["input_shape"])
    model = build_model(recipe, shape, len(names))

    @jax.jit
    def probabilities(images: jax.Array) -> jax.Array:
        logits = model.apply(variables, images, train=False)
        return jax.nn.softmax(logits.astype(jnp.float32))  # type: ignore[union-attr]

    return _Classifier(run, names, shape, config["input_dtype"], probabilities, recipe.data.transposed)


def _of_export(path: Path) -> _Classifier:
    artifact = read_export(path)
    program = jax.jit(artifact.exported.call)

    def call(images: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(program(images))
        except Exception as error:  # of many kinds, where the program's bytes are none of ours
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RunError(f"the program of {path} cannot be run: {reason}; export the run again") from error

    return _Classifier(path, artifact.class_names, artifact.input_shape, str(artifact.input_dtype), call)


def _check(classifier: _Classifier, top: int) -> None:
    source, shape = classifier.source, classifier.shape
    if len(shape) != 3 or classifier.dtype != "uint8":
        raise UsageError(
            f"{source} was trained on features of shape {list(shape)}, not on images; predict takes images"
        )
    if shape[2] not in (1, 3):
        raise UsageError(f"{source} was trained on images of {shape[2]} channels; predict takes grey and colour images")
    if not 1 <= top <= len(classifier.class_names):
        raise UsageError(f"--top is {top}, expected 1 .. {len(classifier.class_names)}, the number of classes")


def _predict_batch(
    classifier: _Classifier, images: Sequence[Path | Image.Image], size: int, top: int
) -> list[Prediction]:
    """Predictions of `images`, computed as one batch of `size`."""
    inputs = [_read(image, classifier.shape, classifier.transposed) for image in images]
    batch = np.zeros((size, *classifier.shape), np.uint8)
    for index, pixels in enumerate(inputs):
        if isinstance(pixels, np.ndarray):
            batch[index] = pixels
    rows = np.asarray(classifier.probabilities(batch))
    if not np.isfinite(rows).all():
        raise RunError(
            f"{classifier.source} gives probabilities that are not finite: it is damaged, or training diverged"
        )
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


def _read(image: Path | Image.Image, shape: tuple[int, ...], transposed: bool) -> np.ndarray | str:
    """The image as the model sees it, or why it cannot be read."""
    try:
        pixels = decode(read_bytes(image, MOST_BYTES) if isinstance(image, Path) else image, (shape[0], shape[1]))
    except OSError as error:
        return error.strerror or str(error)
    except DataError as error:
        return str(error)
    if shape[2] == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    return pixels.swapaxes(0, 1) if transposed else pixels
