"""`predict`: classes of images or rows of features, by a run or an export."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pspinal_jax.data.images import MAX_BYTES, list_images
from pspinal_jax.data.images.decode import decode
from pspinal_jax.data.tables import read_rows
from pspinal_jax.distributed import put
from pspinal_jax.environment import convolution_options, enable_compilation_cache, jit_with
from pspinal_jax.errors import DataError, RunError, UsageError
from pspinal_jax.files import expanded, read_bytes
from pspinal_jax.models import build_model
from pspinal_jax.progress import progress_bar
from pspinal_jax.recipes.schema import TABLES, Recipe
from pspinal_jax.runs.calibration import ACCEPT, Calibration, Unknown, read_calibration
from pspinal_jax.runs.directory import RunDirectory, load_recipe_of
from pspinal_jax.runs.export import DESCRIPTION, ONNX, PROGRAM, is_export, read_export, read_score
from pspinal_jax.runs.result import load_variables
from pspinal_jax.runs.scores import log_softmax
from pspinal_jax.training.sharding import divisible_size, make_mesh, replicated_on, shard_batch

UNKNOWN = "unknown"
"""Label of images that belong to no class of the run."""
BATCH_SIZE = 32
_EXPORT_BATCH = 64
_MAX_THREADS = 8

Images = Any
"""Paths, Pillow images, arrays and frames; see `predict`."""
ResizeMode = Literal["squash", "crop", "pad"]


class Answers(NamedTuple):
    """Log-probabilities float64 [B, C], in nats, and scores of known images float64 [B], None without calibration."""

    log_probabilities: np.ndarray
    scores: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A loaded run or export, for evaluation and prediction.

    Attributes:
      source: the run or the export.
      class_names: names of the C classes.
      input_shape: shape of one example.
      input_dtype: 'uint8' for images, 'float32' for features.
      columns: names of the features, if a table gave them.
      batch_size: number of examples per evaluation step.
      answers: function from inputs [B, ...] on the host to log-probabilities and scores, see `Answers`. It compiles
        once for each B, and raises RunError if they are not finite.
      transposed: whether it takes images with rows and columns swapped.
      fit: how images of another aspect ratio are resized, see `pspinal_jax.data.images.decode.decode`.
      calibration: temperature and score, or None.
      recipe: the run's recipe, including its data; None for an export.
      metadata: config.json of the run, or export.json of the export.
    """

    source: Path
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    input_dtype: str
    columns: tuple[str, ...]
    batch_size: int
    answers: Callable[[np.ndarray], Answers]
    transposed: bool
    fit: ResizeMode
    calibration: Calibration | None
    recipe: Recipe | None
    metadata: dict[str, Any]

    def threshold(self, accept: float | None = None) -> float | None:
        """The score below which an image is unknown, see `Unknown.threshold`; None without a score.

        Raises:
          UsageError: if `accept` is given but the run has no score, or too few images for that threshold.
        """
        if self.calibration is not None and self.calibration.unknown is not None:
            return self.calibration.unknown.threshold(ACCEPT if accept is None else accept)
        if accept is not None:
            raise UsageError(f"accept is {accept:g}, but {self.source} has no score for the unknown; leave it out")
        return None


def load_predictor(source: str | Path, seed_index: int | None = None) -> Predictor:
    """Load the predictor of a run's selected parameters, or of an export.

    Args:
      source: a run directory, the directory of an export, or a file in it.
      seed_index: index of the run's seed; by default the seed that is best on validation. An export has only one.

    Raises:
      UsageError: if the run has no such seed.
      RunError: if the run or the export cannot be read.
    """
    source = expanded(source)
    if source.name in (PROGRAM, ONNX, DESCRIPTION) and source.is_file():
        source = source.parent
    if not is_export(source):
        return _of_run(source, seed_index)
    if seed_index is not None:
        raise UsageError(f"seed_index is {seed_index}, but {source} is an export, of one seed; leave it out")
    return _of_export(source)


def _of_run(run: Path, seed_index: int | None) -> Predictor:
    variables, config, seed_index = load_variables(run, seed_index)
    calibration = read_calibration(RunDirectory(run), seed_index)
    unknown = None if calibration is None else calibration.unknown
    recipe, names, shape = load_recipe_of(config), config["class_names"], tuple(config["input_shape"])
    model = build_model(recipe, shape, len(names))
    mesh = make_mesh()
    options = convolution_options(mesh.devices.flat[0].platform) if recipe.model.backbone != "none" else {}

    def outputs(variables: Any, inputs: jax.Array) -> Any:
        if unknown is None:
            return model.apply(variables, inputs, train=False).astype(jnp.float32), None  # type: ignore[union-attr]
        found: Any = model.apply(variables, inputs, method="features_and_logits")
        features, logits = found
        return logits.astype(jnp.float32), unknown.scores(features)

    compiled = jit_with(options, outputs, out_shardings=replicated_on(mesh))
    on_mesh = put(variables, replicated_on(mesh))

    def answers(inputs: np.ndarray) -> Answers:
        logits, scores = compiled(on_mesh, shard_batch(mesh, inputs))
        rows = np.asarray(logits, np.float64)
        if not np.isfinite(rows).all():
            raise RunError(f"{run} gives logits that are not finite: training diverged; its answers would mean nothing")
        rows = log_softmax(rows if calibration is None else rows / calibration.temperature)
        return Answers(rows, None if scores is None else np.asarray(scores, np.float64))

    return Predictor(
        source=run,
        class_names=tuple(names),
        input_shape=shape,
        input_dtype=config["input_dtype"],
        columns=tuple(config.get("columns", ())),
        batch_size=divisible_size(mesh, recipe.eval_batch_size),
        answers=answers,
        transposed=recipe.data.transposed,
        fit=recipe.data.fit,
        calibration=calibration,
        recipe=recipe,
        metadata=config,
    )


def _of_export(path: Path) -> Predictor:
    exported, description = read_export(path)
    score, inputs = read_score(path, description), exported.in_avals[0]
    compiled = jax.jit(exported.call if score is None else partial(score.exported.call, score.arrays))
    calibration = None
    if "temperature" in description:
        unknown = None if score is None else Unknown.of(score.arrays)
        calibration = Calibration(description["temperature"], unknown)

    def answers(inputs: np.ndarray) -> Answers:
        try:
            found = compiled(inputs)
            rows, *scores = (np.asarray(each, np.float64) for each in (found if score else (found,)))
        except Exception as error:  # of many kinds, where the program is another one's
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RunError(f"the program of {path} cannot be run: {reason}; export the run again") from error
        if not np.isfinite(rows).all():
            raise RunError(f"{path} gives probabilities that are not finite: it is damaged, or training diverged")
        return Answers(np.log(np.maximum(rows, np.finfo(np.float32).tiny)), scores[0] if scores else None)

    return Predictor(
        source=path,
        class_names=tuple(description["class_names"]),
        input_shape=inputs.shape[1:],
        input_dtype=str(inputs.dtype),
        columns=tuple(description["input"].get("columns", ())),
        batch_size=_EXPORT_BATCH,
        answers=answers,
        transposed=False,
        fit=description["input"].get("fit", "squash"),
        calibration=calibration,
        recipe=None,
        metadata=description,
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Attributes:
      path: path of the image, or of a table with the row's number after a colon; None for arrays and Pillow images.
      classes: (name, probability) of the most probable classes, most probable first; empty after an error.
      error: why the image could not be read, or None.
      score: how well the image resembles its nearest class, see `pspinal_jax.runs.calibration`; None if the run has no
        such score.
      known: whether the score reaches the threshold; None without a score.
    """

    path: Path | None
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    score: float | None = None
    known: bool | None = None

    @property
    def label(self) -> str:
        """The most probable class, or `UNKNOWN`; "" after an error."""
        return "" if not self.classes else UNKNOWN if self.known is False else self.classes[0][0]


def predict(
    source: str | Path | Predictor,
    images: Images,
    top: int = 1,
    seed_index: int | None = None,
    show_progress: bool = False,
    accept: float | None = None,
) -> list[Prediction]:
    """Classify images, or rows of features, with a run's selected parameters.

    Threads decode images while the model computes. All batches have the same size, a power of two up to 32, and the
    last one is padded. A predictor compiles once for each size.

    Args:
      source: a run directory; an export, as its directory or a file in it; or a loaded predictor.
      images: files of any format that Pillow reads, Pillow images, and arrays uint8 [H, W] or [H, W, C], C 1 or 3; or
        one array uint8 [N, H, W] or [N, H, W, C]. Images of any size are resized to the model's input. For a run on
        features: numbers [N, D] as an array or a frame, or paths of tables.
      top: number of classes to give for each image.
      seed_index: index of the run's seed; by default the seed that is best on validation. An export has only one.
      show_progress: whether to show a progress bar on standard error if prediction takes long.
      accept: fraction of new images of the run's classes to accept as known, by default 0.95.

    Returns:
      A prediction for each image or row, in the same order. Images that cannot be read have an error.

    Raises:
      UsageError: if `images`, `top`, `seed_index` or `accept` are not as described.
      DataError: if features are not numbers, or some are missing.
      RunError: if the run or the export cannot be read.
    """
    enable_compilation_cache()
    predictor = source if isinstance(source, Predictor) else load_predictor(source, seed_index)
    names = predictor.class_names
    if not 1 <= top <= len(names):
        raise UsageError(f"top is {top}, expected 1 .. {len(names)}, the number of classes")
    threshold, predictions = predictor.threshold(accept), []
    for path, row, score in _answers(predictor, images, show_progress):
        if isinstance(row, str):
            predictions.append(Prediction(path, error=row))
        else:
            best = np.argsort(-row, kind="stable")[:top]
            classes = tuple((names[index], float(row[index])) for index in best)
            known = None if score is None or threshold is None else score >= threshold
            predictions.append(Prediction(path, classes, None, score, known))
    return predictions


def predict_proba(predictor: Predictor, images: Images) -> np.ndarray:
    """Class probabilities float64 [N, C] of `images`; raises like `predict`.

    Raises:
      DataError: if an image cannot be read.
    """
    enable_compilation_cache()
    found = []
    for index, (path, row, _) in enumerate(_answers(predictor, images)):
        if isinstance(row, str):
            raise DataError(f"image {index}, {path or 'an array'}, cannot be read: {row}")
        found.append(row)
    return np.reshape(found, (len(found), len(predictor.class_names)))


def _answers(
    predictor: Predictor, images: Images, show_progress: bool = False
) -> Iterator[tuple[Path | None, np.ndarray | str, float | None]]:
    """For each image or row: its path, its probabilities float64 [C] or the reason for an error, and its score."""
    shape = predictor.input_shape
    if len(shape) == 3 and shape[2] not in (1, 3):
        raise UsageError(
            f"{predictor.source} was trained on images of {shape[2]} channels; predict takes grey and colour images"
        )
    paths: Sequence[Path | None]
    items: Any
    if len(shape) == 1:
        paths, items = _rows(predictor, images)
    else:
        items = _each(images)
        paths = [item if isinstance(item, Path) else None for item in items]
    size = min(BATCH_SIZE, 1 << (len(items) - 1).bit_length())
    batches = [items[first : first + size] for first in range(0, len(items), size)]
    with (
        ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool,
        progress_bar(len(items), "predict", "image", show_progress, delay=1.0) as bar,
    ):
        reading = (batch if len(shape) == 1 else pool.map(partial(_read, predictor), batch) for batch in batches)
        ahead: Iterable[Any] = next(reading, ())
        for start in range(0, len(items), size):
            found, ahead = list(ahead), next(reading, ())  # which threads decode while the model works
            inputs = np.zeros((size, *shape), predictor.input_dtype)
            for index, pixels in enumerate(found):
                if not isinstance(pixels, str):
                    inputs[index] = pixels
            log_probabilities, scores = predictor.answers(inputs)
            rows = np.exp(log_probabilities)
            listed = [None] * size if scores is None else scores.tolist()
            for path, pixels, row, score in zip(paths[start : start + size], found, rows, listed, strict=False):
                yield path, pixels if isinstance(pixels, str) else row, score
            bar.update(len(found))


def find_images(given: Iterable[Path]) -> list[Path]:
    """The files `given`, with each folder replaced by the sorted image files in it and its subfolders.

    Raises:
      UsageError: if a folder has no image files.
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


def _rows(predictor: Predictor, given: Any) -> tuple[Sequence[Path | None], np.ndarray]:
    """Names for the rows of features in `given`, by their table and number, and the rows, float32 [N, D]."""
    width = predictor.input_shape[0]
    tables = [given] if isinstance(given, str | Path) else given
    if not (isinstance(tables, list | tuple) and tables and all(isinstance(each, str | Path) for each in tables)):
        rows = read_rows(given, predictor.columns, width)
        return [None] * len(rows), rows
    names, found = [], []
    for path in map(expanded, tables):
        if path.suffix.lower() not in TABLES:
            raise UsageError(
                f"{path} is not a table ({', '.join(TABLES)}), but {predictor.source} was trained on features, "
                "not on images"
            )
        found.append(read_rows(path, predictor.columns, width))
        names += [Path(f"{path}:{row}") for row in range(len(found[-1]))]
    return names, np.concatenate(found)


def _each(images: Images) -> list[Path | Image.Image]:
    """`images` as paths and Pillow images; UsageError if something among them is not an image."""
    array = images if isinstance(images, np.ndarray) and images.dtype.kind not in "UO" else None
    if array is not None and (array.ndim < 3 or (array.ndim == 3 and array.shape[2] in (1, 3))):
        raise UsageError(f"images is an array {list(array.shape)}, expected several images; put one image into a list")
    if isinstance(images, str | Path | Image.Image) or hasattr(images, "columns"):
        raise UsageError(f"images is {images!r:.100}, expected several images; put one image into a list")
    return [_opened(image) for image in images]


def _opened(image: Any) -> Path | Image.Image:
    if isinstance(image, str | Path):
        return expanded(image)
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    masked = np.ma.is_masked(image)
    if masked or array.dtype != np.uint8 or not array.size or array.shape[2:] not in ((), (1,), (3,)) or array.ndim < 2:
        raise UsageError(
            f"an image is an array {array.dtype} {list(array.shape)}{' with masked pixels' * masked}, expected uint8 "
            "[H, W], [H, W, 1] or [H, W, 3]"
        )
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _read(predictor: Predictor, image: Path | Image.Image) -> np.ndarray | str:
    """The image as the model sees it, or the reason why it cannot be read."""
    shape = predictor.input_shape
    try:
        content = read_bytes(image, MAX_BYTES) if isinstance(image, Path) else image
        pixels = decode(content, (shape[0], shape[1]), predictor.fit)
    except OSError as error:
        return error.strerror or str(error)
    except DataError as error:
        return str(error)
    if shape[2] == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    return pixels.swapaxes(0, 1) if predictor.transposed else pixels
