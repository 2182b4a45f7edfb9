"""`predict`: a run's classes for pictures in files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pspinal_jax.data.photos.decode import decode
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.models.build import build_model
from pspinal_jax.runs.compilation_cache import enable_compilation_cache
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


def predict(run: Path, paths: Sequence[Path], top: int = 1, seed_index: int | None = None) -> list[Prediction]:
    """Classify pictures with a run's selected parameters.

    Args:
      run: run directory.
      paths: picture files of any format and size that Pillow reads; they are resized to what the model sees.
      top: how many classes to name for each.
      seed_index: which of the run's seeds; by default the best on validation.

    Returns:
      A prediction a path, in their order; unreadable pictures have an error.

    Raises:
      PSpinalError: if the run cannot be read, or does not classify images.
    """
    enable_compilation_cache()
    variables, config = load_variables(run, seed_index)
    recipe, names = load_recipe_of(config), config["class_names"]
    shape = tuple(config["input_shape"])
    if len(shape) != 3 or config["input_dtype"] != "uint8":
        raise UsageError(f"{run} was trained on features of shape {list(shape)}, not on images; predict takes images")
    if shape[2] not in (1, 3):
        raise UsageError(f"{run} was trained on images of {shape[2]} channels; predict takes grey and colour images")
    if not 1 <= top <= len(names):
        raise UsageError(f"--top is {top}, expected 1 .. {len(names)}, the number of classes")
    model = build_model(recipe, shape, len(names))

    @jax.jit
    def probabilities(images: jax.Array) -> jax.Array:
        logits = model.apply(variables, images, train=False)
        return jax.nn.softmax(logits.astype(jnp.float32))  # type: ignore[union-attr]

    predictions: list[Prediction] = []
    for start in range(0, len(paths), BATCH_SIZE):
        part = paths[start : start + BATCH_SIZE]
        images = [_read(path, shape, recipe.data.transposed) for path in part]
        batch = np.zeros((min(BATCH_SIZE, len(paths)), *shape), np.uint8)
        for index, image in enumerate(images):
            if isinstance(image, np.ndarray):
                batch[index] = image
        rows = np.asarray(probabilities(batch))
        for path, image, row in zip(part, images, rows, strict=False):
            if isinstance(image, str):
                predictions.append(Prediction(path, error=image))
                continue
            best = np.argsort(-row, kind="stable")[:top]
            predictions.append(Prediction(path, tuple((names[index], float(row[index])) for index in best)))
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
