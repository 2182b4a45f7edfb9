"""The Python API of runs: train a recipe or open a run, and use it. The commands call the same functions."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import flax.linen as nn
import numpy as np

from pspinal_jax.errors import UsageError
from pspinal_jax.files import expanded
from pspinal_jax.models import build_model
from pspinal_jax.progress import absl_quietened
from pspinal_jax.recipes import Recipe, load_recipe
from pspinal_jax.recipes.registry import on_cached_features
from pspinal_jax.recipes.schema import RunOptions
from pspinal_jax.recipes.typed import typed
from pspinal_jax.runs.directory import RunDirectory, load_recipe_of
from pspinal_jax.runs.evaluate import evaluate
from pspinal_jax.runs.export import export_run
from pspinal_jax.runs.predict import Images, Prediction, Predictor, load_predictor, predict, predict_proba
from pspinal_jax.runs.result import load_variables
from pspinal_jax.runs.train import train as train_recipe
from pspinal_jax.runs.train import work_directory
from pspinal_jax.training.fitted import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run:
    """A run in its directory, opened by `load_run` or returned by `train`. Parameters are read on first use.

    Attributes:
      path: the run directory.
      seed_index: index of the seed to use; None for the seed that is best on validation.
      config: the contents of config.json.
      recipe: the recipe that was trained, including its data.
      class_names: names of the C classes, in the order of the logits.
    """

    def __init__(self, path: str | Path, seed_index: int | None = None) -> None:
        self.path, self.seed_index = expanded(path), seed_index
        self.config: dict[str, Any] = RunDirectory(self.path).config()
        self.recipe: Recipe = load_recipe_of(self.config)
        self.class_names = tuple(self.config["class_names"])

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, recipe {self.recipe.card.name!r})"

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """The contents of result.json; ``result["test_accuracy"]["mean"]`` is 0 .. 1.

        Raises:
          RunError: if the run is not finished, or result.json is damaged.
        """
        return RunDirectory(self.path).finished_result()

    @property
    def history(self) -> History:
        """The lines of metrics.jsonl: a dict for each epoch so far, see `History`."""
        return History(RunDirectory(self.path).metrics())

    def plot(self) -> "Figure":
        """Loss and accuracy by epoch as a matplotlib Figure; for K seeds, their mean and range."""
        return self.history.plot()

    def _repr_html_(self) -> str:
        return self.history._repr_html_()

    @functools.cached_property
    @absl_quietened()
    def variables(self) -> dict[str, Any]:
        """The selected parameters and running statistics, {'params': .., 'batch_stats': ..}, float32.

        Raises:
          PSpinalError: if they cannot be read, or the run has no such seed.
        """
        return load_variables(self.path, self.seed_index)[0]

    @functools.cached_property
    def model(self) -> nn.Module:
        """The linen module: ``run.model.apply(run.variables, inputs [N, ...], train=False)`` gives logits [N, C].

        Inputs are what config.json says: uint8 images [N, H, W, channels], or float32 features [N, D].
        """
        return build_model(self.recipe, tuple(self.config["input_shape"]), len(self.class_names))

    @functools.cached_property
    def _predictor(self) -> Predictor:
        """Loaded once, and with it what it has compiled."""
        return load_predictor(self.path, self.seed_index)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.seed_index)  # compiled programs stay in their process

    @absl_quietened()
    def predict(self, images: Images, top: int = 1, accept: float | None = None) -> list[Prediction]:
        """Classify `images`; see `pspinal_jax.runs.predict.predict`, which raises PSpinalError.

        Args:
          images: paths (Path or text), Pillow images and arrays uint8 [H, W] or [H, W, C] of any size, in any mixture;
            or one array uint8 [N, H, W] or [N, H, W, C]. C is 1 or 3. For a run on features: numbers [N, D] as an array
            or a frame, whose columns are matched by name, or paths of tables.
          top: number of classes to give for each image.
          accept: fraction of new images of the run's classes to accept as known, by default 0.95.

        Returns:
          A `Prediction` for each image, in the same order. For a file that cannot be read, it has an `error`. If the
          run can reject unknown images, `known` says whether the image belongs to one of its classes.
        """
        return predict(self._predictor, images, top, accept=accept)

    @absl_quietened()
    def predict_proba(self, images: Images) -> np.ndarray:
        """Class probabilities float64 [N, C] of `images` (see `predict`), with columns in the order of `class_names`.

        Raises:
          DataError: if an image cannot be read.
        """
        return predict_proba(self._predictor, images)

    @absl_quietened()
    def evaluate(self, data_path: str | Path | None = None) -> dict[str, Any]:
        """Evaluate on the test split of the run or of `data_path`; see `pspinal_jax.runs.evaluate.evaluate`."""
        return evaluate(self._predictor, data_path=data_path)

    def export(self, output: str | Path | None = None, format: Literal["jax", "onnx"] = "jax") -> Path:
        """Write the classifier as a program for JAX alone, or for ONNX Runtime; see `export_run`.

        Args:
          output: directory to write, by default ``export`` in the run directory.
          format: 'onnx' adds model.onnx.

        Returns:
          The directory that was written.
        """
        return export_run(self.path, output, self.seed_index, format)


def load_run(path: str | Path, seed_index: int | None = None) -> Run:
    """The run in the directory `path`.

    Args:
      path: run directory written by `train`, finished or not.
      seed_index: index of the seed, from 0; by default the seed that is best on validation.

    Raises:
      RunError: if it is not a run directory, or its config.json is damaged.
    """
    return Run(path, seed_index)


@absl_quietened()
def train(recipe: Recipe | str | Path, **changes: Any) -> Run:
    """Train `recipe`, resume its unfinished run, or open its finished run.

    ``train("digits", epochs=5, model__layer_width=64, workdir="runs/mine")`` does the same as the command
    ``pspinal-jax train digits --epochs 5 --model.layer-width 64 --workdir runs/mine``.

    Args:
      recipe: a recipe, the name of one, or the path of a .py file that defines one.
      **changes: flags of `train` by name: fields of `pspinal_jax.recipes.Recipe`, where nested fields have a double
        underscore (``data__path``) or, in ``**{"data.path": ..}``, a dot; and fields of `RunOptions` (``workdir``,
        ``init_from``, ``checkpoint_seconds``, ``workers``, ``tensorboard``). A nested config can be given as a whole.

    Returns:
      The finished run.

    Raises:
      UsageError: if there is no such recipe, field or choice, or a value has the wrong type or is out of range.
      PSpinalError: if the data or the run directory cannot be used, or training fails.
      pspinal_jax.training.signals.Stopped: after SIGINT (Ctrl-C) or SIGTERM, once the run is saved; repeat the call to
        resume.
    """
    settled, options = settle(recipe, changes)
    train_recipe(settled, options)
    return Run(work_directory(settled, options))


def settle(recipe: Recipe | str | Path, changes: Mapping[str, Any]) -> tuple[Recipe, RunOptions]:
    """The recipe and options that `train` runs, of its arguments.

    Raises:
      UsageError: as `train`.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    given = {name.replace("__", ".").replace("-", "_"): value for name, value in changes.items()}
    for_options = {name: given.pop(name) for name in RunOptions.__dataclass_fields__ if name in given}
    options = _replaced(RunOptions(), for_options)
    return resolve(loaded, lambda recipe: _replaced(recipe, given), options), options


def resolve(recipe: Recipe, change: Callable[[Recipe], Recipe], options: RunOptions) -> Recipe:
    """The recipe that `train` runs, see `on_cached_features`; a run of before that came about goes on as it began."""
    asked, plain = on_cached_features(recipe, change), change(recipe)
    directory = RunDirectory(work_directory(plain, options))
    if asked != plain and directory.config_path.exists():
        began = load_recipe_of(directory.config())
        names = plain.__dataclass_fields__.keys() - {"card", "data", "mesh"}
        if all(getattr(began, name) == getattr(plain, name) for name in names):
            return plain
    return asked


def _replaced(config: Any, changes: Mapping[str, Any]) -> Any:
    """The dataclass `config` with `changes` by dotted name, all at once, since some are only valid together."""
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    for name, value in sorted(changes.items(), key=lambda change: "." in change[0]):  # configs given whole come first
        field, _, inner = name.partition(".")
        held = values.get(field)
        known = held if isinstance(held, dict) else getattr(held, "__dataclass_fields__", ())
        if field not in values or field == "card" or (inner and inner not in known):
            raise UsageError(f"train has no setting {name!r}")
        if isinstance(value, dict):  # it would put every field that it lacks back to its default
            raise UsageError(f"{name} is {value!r}, expected {type(held).__name__}")
        if inner:
            value = {each: held[each] if isinstance(held, dict) else getattr(held, each) for each in known} | {
                inner: value
            }
        values[field] = value
    return typed("train", values, type(config))
