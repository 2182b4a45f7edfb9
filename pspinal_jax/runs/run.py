"""The Python API of runs: train a recipe, or open a run, and use it; the commands call the same functions."""

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
    """A run in its directory. `load_run` opens one, `train` returns one; parameters are read when they are asked for.

    Attributes:
      path: the run directory.
      seed_index: which of the run's seeds its answers are of; None for the best on validation.
      config: what config.json holds.
      recipe: the recipe that was trained, its data included.
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
        """What result.json holds; ``result["test_accuracy"]["mean"]`` is 0 .. 1.

        Raises:
          RunError: if the run is not finished, or result.json is damaged.
        """
        return RunDirectory(self.path).finished_result()

    @property
    def history(self) -> History:
        """The epochs so far, a dict each: the lines of metrics.jsonl, see `History`."""
        return History(RunDirectory(self.path).metrics())

    def plot(self) -> "Figure":
        """Loss and accuracy by epoch as a matplotlib Figure; of K seeds their mean and range."""
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
            or one array uint8 [N, H, W] or [N, H, W, C]. C is 1 or 3. Of a run on features, numbers [N, D] as an array
            or a frame, whose columns are found by their names, or tables by their paths.
          top: how many classes to name for each.
          accept: the share of new images of the run's classes that shall count as known, by default 0.95.

        Returns:
          A `Prediction` an image, in their order; a file that cannot be read has its `error`, and where the run has a
          score for the unknown, `known` tells whether the image is of one of its classes.
        """
        return predict(self._predictor, images, top, accept=accept)

    @absl_quietened()
    def predict_proba(self, images: Images) -> np.ndarray:
        """Class probabilities float64 [N, C] of `images`, which `predict` describes; columns as `class_names`.

        Raises:
          DataError: if an image cannot be read.
        """
        return predict_proba(self._predictor, images)

    @absl_quietened()
    def evaluate(self, data_path: str | Path | None = None) -> dict[str, Any]:
        """Evaluate on the run's test split, or that of `data_path`; as `pspinal_jax.runs.evaluate.evaluate`."""
        return evaluate(self._predictor, data_path=data_path)

    def export(self, output: str | Path | None = None, format: Literal["jax", "onnx"] = "jax") -> Path:
        """Write the classifier as files that JAX, or ONNX Runtime, alone runs; as `export_run`, which has the details.

        Args:
          output: the directory to write; by default ``export`` in the run.
          format: 'onnx' adds model.onnx.

        Returns:
          The directory written.
        """
        return export_run(self.path, output, self.seed_index, format)


def load_run(path: str | Path, seed_index: int | None = None) -> Run:
    """The run in the directory `path`.

    Args:
      path: run directory of a `train`, finished or not.
      seed_index: which of its seeds, from 0; by default the best on validation.

    Raises:
      RunError: if it is not a run directory, or its config.json is damaged.
    """
    return Run(path, seed_index)


@absl_quietened()
def train(recipe: Recipe | str | Path, **changes: Any) -> Run:
    """Train `recipe`, or what is left of it, in its run directory; a finished run is opened.

    ``train("digits", epochs=5, model__layer_width=64, workdir="runs/mine")`` is the command
    ``pspinal-jax train digits --epochs 5 --model.layer-width 64 --workdir runs/mine``.

    Args:
      recipe: a recipe, the name of one, or the path of a .py file that defines one.
      **changes: flags of `train` by their names: fields of `pspinal_jax.recipes.Recipe`, nested ones with a double
        underscore (``data__path``) or, in a ``**{"data.path": ..}``, a dot; and fields of `RunOptions` (``workdir``,
        ``init_from``, ``checkpoint_seconds``, ``workers``, ``tensorboard``). A nested config can be given whole.

    Returns:
      The finished run.

    Raises:
      UsageError: if there is no such recipe, field or choice, or a value is of the wrong type or out of range.
      PSpinalError: if the data or the run directory cannot be used, or training fails.
      pspinal_jax.training.signals.Stopped: after SIGINT (Ctrl-C) or SIGTERM, once the run is saved; call again to go
        on.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    given = {name.replace("__", ".").replace("-", "_"): value for name, value in changes.items()}
    for_options = {name: given.pop(name) for name in RunOptions.__dataclass_fields__ if name in given}
    options = _replaced(RunOptions(), for_options)
    changed = resolve(loaded, lambda recipe: _replaced(recipe, given), options)
    train_recipe(changed, options)
    return Run(work_directory(changed, options))


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
    """The dataclass `config` with `changes` by dotted name, all at once, as some only fit together."""
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
