"""`predict`: the classes that a run, or an export of one, gives pictures in files."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pspinal_jax.data.images.decode import decode
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.export.directory import is_export, read_export
from pspinal_jax.models.build import build_model
from pspinal_jax.runs.restore import load_recipe_of, load_variables

BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of one picture.

    Attributes:
      path: the picture's file.
      classes: (name, probability) of the most probable classes, most probable first; empty where there is an error.
      error: why it could not be read, or None.
    """

    path: Path
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


def predict(source: Path, paths: Sequence[Path], top: int = 1, seed_index: int | None = None) -> list[Prediction]:
    """Classify pictures with a run's selected parameters.

    Args:
      source: run directory, or the directory of an export.
      paths: picture files of any format and size that Pillow reads; they are resized to what the model sees.
      top: how many classes to name for each.
      seed_index: which of the run's seeds; by default the best on validation. An export has but one.

    Returns:
      A prediction a path, in their order; unreadable pictures have an error.

    Raises:
      PSpinalError: if the run or the export cannot be read, or does not classify images.
    """
    enable_compilation_cache()
    if is_export(source):
        if seed_index is not None:
            raise UsageError(f"--seed-index is {seed_index}, but {source} is an export, of one seed; leave it out")
        classifier = _of_export(source)
    else:
        classifier = _of_run(source, seed_index)
    _check(classifier, top)
    predictions: list[Prediction] = []
    for start in range(0, len(paths), BATCH_SIZE):
        predictions += _predict_batch(classifier, paths[start : start + BATCH_SIZE], min(BATCH_SIZE, len(paths)), top)
    return predictions


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
    call = jax.jit(artifact.exported.call)
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


def _predict_batch(classifier: _Classifier, paths: Sequence[Path], size: int, top: int) -> list[Prediction]:
    """Predictions of `paths`, computed as one batch of `size`."""
    images = [_read(path, classifier.shape, classifier.transposed) for path in paths]
    batch = np.zeros((size, *classifier.shape), np.uint8)
    for index, image in enumerate(images):
        if isinstance(image, np.ndarray):
            batch[index] = image
    predictions = []
    for path, image, row in zip(paths, images, np.asarray(classifier.probabilities(batch)), strict=False):
        if isinstance(image, str):
            predictions.append(Prediction(path, error=image))
            continue
        best = np.argsort(-row, kind="stable")[:top]
        named = tuple((classifier.class_names[index], float(row[index])) for index in best)
        predictions.append(Prediction(path, named))
    return predictions


def _read(path: Path, shape: tuple[int, ...], transposed: bool) -> np.ndarray | str:
    """The picture as the model sees it, or why it cannot be read."""
    try:
        image = decode(path.read_bytes(), (shape[0], shape[1]))
    except OSError as error:
        return error.strerror or str(error)
    except DataError as error:
        return str(error)
    if shape[2] == 1:
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    return image.swapaxes(0, 1) if transposed else image
