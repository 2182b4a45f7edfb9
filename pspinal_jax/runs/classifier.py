"""A run or an export as what evaluation and prediction need of it: examples on the host to log-probabilities."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.distributed import put
from pspinal_jax.environment import convolution_options, jit_with
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.export.directory import DESCRIPTION, PROGRAM, is_export, read_export
from pspinal_jax.models import build_model
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.directory import load_recipe_of
from pspinal_jax.runs.restore import load_variables
from pspinal_jax.training.sharding import divisible_size, make_mesh, replicated_on, shard_batch

EXPORT_BATCH = 64
Fit = Literal["squash", "crop", "pad"]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Classifies examples.

    Attributes:
      source: the run or the export.
      class_names: names of the C classes.
      input_shape: one example's shape.
      input_dtype: 'uint8' for images, 'float32' for features.
      columns: names of the features, where a table gave them.
      batch_size: examples that an evaluation hands it at a time.
      log_probabilities: inputs [B, ...] on the host to float64 [B, C], nats; RunError where they are not finite. A
        program is compiled for each B.
      transposed: it takes images with rows and columns swapped.
      fit: how an image of another aspect becomes one of the input's, see `pspinal_jax.data.decode.decode`.
      recipe: what the run was trained by, its data included; None for an export.
      described: config.json of the run, export.json of the export.
    """

    source: Path
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    input_dtype: str
    columns: tuple[str, ...]
    batch_size: int
    log_probabilities: Callable[[np.ndarray], np.ndarray]
    transposed: bool
    fit: Fit
    recipe: Recipe | None
    described: dict[str, Any]


def load_classifier(source: Path, seed_index: int | None = None) -> Classifier:
    """The classifier of a run's selected parameters, or of an export.

    Args:
      source: run directory, the directory of an export, or the program or description in it.
      seed_index: which of the run's seeds; by default the best on validation. An export has but one.

    Raises:
      UsageError: if there is no such seed.
      RunError: if the run or the export cannot be read.
    """
    if source.name in (PROGRAM, DESCRIPTION) and source.is_file():
        source = source.parent
    if not is_export(source):
        return _of_run(source, seed_index)
    if seed_index is not None:
        raise UsageError(f"--seed-index is {seed_index}, but {source} is an export, of one seed; leave it out")
    return _of_export(source)


def _of_run(run: Path, seed_index: int | None) -> Classifier:
    variables, config = load_variables(run, seed_index)
    recipe, names, shape = load_recipe_of(config), config["class_names"], tuple(config["input_shape"])
    model = build_model(recipe, shape, len(names))
    mesh = make_mesh()
    options = convolution_options(mesh.devices.flat[0].platform) if recipe.model.backbone != "none" else {}

    def logits(variables: Any, inputs: jax.Array) -> jax.Array:
        return model.apply(variables, inputs, train=False).astype(jnp.float32)  # type: ignore[union-attr]

    program = jit_with(options, logits, out_shardings=replicated_on(mesh))
    placed = put(variables, replicated_on(mesh))

    def log_probabilities(inputs: np.ndarray) -> np.ndarray:
        rows = np.asarray(program(placed, shard_batch(mesh, inputs)), np.float64)
        if not np.isfinite(rows).all():
            raise RunError(f"{run} gives logits that are not finite: training diverged; its answers would mean nothing")
        rows -= np.logaddexp.reduce(rows, axis=-1, keepdims=True)
        return rows

    return Classifier(
        source=run,
        class_names=tuple(names),
        input_shape=shape,
        input_dtype=config["input_dtype"],
        columns=tuple(config.get("columns", ())),
        batch_size=divisible_size(mesh, recipe.eval_batch_size),
        log_probabilities=log_probabilities,
        transposed=recipe.data.transposed,
        fit=recipe.data.fit,
        recipe=recipe,
        described=config,
    )


def _of_export(path: Path) -> Classifier:
    artifact = read_export(path)
    fit = artifact.description["input"].get("fit", "squash")
    if fit not in get_args(Fit):
        raise RunError(f"{path / DESCRIPTION} has the fit {fit!r}, expected squash, crop or pad; export the run again")
    program = jax.jit(artifact.exported.call)

    def log_probabilities(inputs: np.ndarray) -> np.ndarray:
        try:
            rows = np.asarray(program(inputs), np.float64)
        except Exception as error:  # of many kinds, where the program's bytes are none of ours
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RunError(f"the program of {path} cannot be run: {reason}; export the run again") from error
        if not np.isfinite(rows).all():
            raise RunError(f"{path} gives probabilities that are not finite: it is damaged, or training diverged")
        return np.log(np.maximum(rows, np.finfo(np.float32).tiny))

    return Classifier(
        source=path,
        class_names=tuple(artifact.class_names),
        input_shape=artifact.input_shape,
        input_dtype=str(artifact.input_dtype),
        columns=tuple(artifact.description["input"].get("columns", ())),
        batch_size=EXPORT_BATCH,
        log_probabilities=log_probabilities,
        transposed=False,
        fit=fit,
        recipe=None,
        described=artifact.description,
    )
