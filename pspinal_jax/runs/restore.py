"""Reading a run back: its recipe, and the parameters that it selected."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from pspinal_jax.checkpoints import read_newest
from pspinal_jax.distributed import barrier, broadcast_from_primary, is_primary
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import differences
from pspinal_jax.models import Classifier, abstract_variables, build_model, count_features
from pspinal_jax.progress import say
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.recipes.typed import typed
from pspinal_jax.runs import manifest
from pspinal_jax.runs.directory import RunDirectory, load_recipe_of, writing
from pspinal_jax.runs.features import BACKBONE, add_backbone, head_recipe
from pspinal_jax.runs.result import best_seed_index, leading_seed, selected_checksum
from pspinal_jax.training.sharding import make_mesh, replicated_on
from pspinal_jax.training.stages import TrainingProgress
from pspinal_jax.weights import backbone_variables
from pspinal_jax.weights.variables import first_not_finite, read_variables, save_variables

START = "start.safetensors"


def load_variables(run: Path, seed_index: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and running statistics that a run's result stands for: selected, or the last (paper's protocol).

    Args:
      run: a run directory.
      seed_index: which of the run's seeds; by default the best on validation.

    Returns:
      ({'params': .., 'batch_stats': ..}, config.json). The variables are what the run's model applies.

    Raises:
      RunError: if `run` is no run directory, its newest checkpoint is damaged or missing, or the parameters are not
        those that result.json speaks of, or not finite.
      UsageError: if there is no such seed.
    """
    directory = RunDirectory(run)
    config = directory.config()
    recipe = load_recipe_of(config)
    count = recipe.num_seeds
    result = directory.result()
    if seed_index is None:
        seed_index = best_seed_index(config, result, directory.metrics())
    if not 0 <= seed_index < count:
        raise UsageError(f"--seed-index is {seed_index}, expected 0 .. {count - 1}: the run has {count} seeds")
    try:
        shapes = _trained_shapes(recipe, config)
    except (UsageError, TypeError, ValueError, OverflowError) as error:  # what flax and jax say of odd sizes
        raise RunError(f"{directory.config_path} describes no model: {error}; train in another --workdir") from error
    lead = (count,) if count > 1 else ()
    sharding = replicated_on(make_mesh())

    def wanted(position: dict[str, Any]) -> dict[str, Any]:
        if not any(typed("position", position, TrainingProgress).best_epoch):
            raise RunError(f"{run} has not finished an epoch yet; run `train` again to go on")
        model_trees = {name: shapes.get(name, {}) for name in ("params", "batch_stats")}
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(lead + leaf.shape, leaf.dtype, sharding=sharding), model_trees
        )
        return abstract if takes_last else {"best": abstract}

    # Under the paper's protocol the result is the last epoch's; its "best" was selected on the test split.
    takes_last = recipe.protocol == "paper"
    if result is not None and not any(directory.checkpoints_path.glob("*")):
        raise RunError(
            f"{run} is a finished run whose checkpoints are gone from {directory.checkpoints_path}, and its parameters "
            "with them; put that folder back, or train again in another --workdir"
        )
    trees, progress = read_newest(directory.checkpoints_path, wanted)
    selected = trees if takes_last else trees["best"]
    if result is not None and not _speaks_of(result, selected, progress):
        raise RunError(
            f"the newest checkpoint in {directory.checkpoints_path} does not hold the parameters of result.json: it "
            "was replaced, or a newer one is missing; train again in another --workdir"
        )
    variables = leading_seed(selected, seed_index, count)
    if recipe.cache_features:
        variables = add_backbone(run, variables)
        shape = tuple(config["input_shape"])
        model = build_model(recipe, shape, len(config["class_names"]))
        expected = abstract_variables(model, shape, config["input_dtype"])
        if listed := _misfits(flatten_dict(variables), flatten_dict(expected)):
            raise RunError(f"{run / BACKBONE} does not fit its config.json: {listed}; train in another --workdir")
    _check_finite(run, variables)
    return variables, config


def _speaks_of(result: dict[str, Any], selected: Any, progress: dict[str, Any]) -> bool:
    """Whether `result` is the result of the parameters `selected`, of all seeds."""
    if "selected_checksum" in result:
        return bool(result["selected_checksum"] == selected_checksum(selected))
    if "selected_epoch" in result:  # a run of before there was such a checksum
        return bool(result["selected_epoch"] == (progress.get("selected_epoch") or progress["best_epoch"]))
    return bool(result["test_accuracy"]["each"] == progress.get("last_accuracy"))


def _check_finite(run: Path, variables: dict[str, Any]) -> None:
    name = first_not_finite(variables)
    if name is not None:
        raise RunError(
            f"{run} holds parameters that are not finite, {name} first: training diverged; train again in another "
            "--workdir with a lower --optimizer.learning-rate"
        )


def _trained_shapes(recipe: Recipe, config: dict[str, Any]) -> Any:
    """Shapes of the variables that the run's checkpoints hold."""
    shape, dtype = tuple(config["input_shape"]), config["input_dtype"]
    if recipe.cache_features:
        shape, dtype, recipe = (count_features(recipe, shape),), "float32", head_recipe(recipe)
    return abstract_variables(build_model(recipe, shape, len(config["class_names"])), shape, dtype)


def keep_start(
    directory: RunDirectory, given: dict[str, Any] | None, read_given: Callable[[], dict[str, Any]]
) -> Callable[[], dict[str, Any]]:
    """Gives the variables that a run starts from, which lie in its directory from its beginning on.

    Args:
      directory: the run's.
      given: what was read for a run that begins; None for one that goes on.
      read_given: reads it, see `start_variables`; called only for runs that have no such file.
    """
    path = directory.path / START

    def save(variables: dict[str, Any]) -> dict[str, Any]:
        if variables and is_primary():
            with writing(path):
                save_variables(path, variables)
            manifest.record(directory.path, START)
        barrier()
        return variables

    def start() -> dict[str, Any]:
        if not broadcast_from_primary(path.exists):
            return save(read_given())
        manifest.check(directory.path, START)
        return read_variables(path)

    if given is None:
        return start
    save(given)
    return lambda: given


def start_variables(
    recipe: Recipe,
    model: Classifier,
    init_from: Path | None,
    input_shape: tuple[int, ...],
    input_dtype: Any,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Variables to start from, by collection; what is not in them starts from the seed.

    Args:
      recipe: may name weights for the backbone.
      model: the recipe's.
      init_from: run directory whose selected parameters and running statistics are taken, those of the output layer
        only where the classes are the same; they go before the weights.
      input_shape: one example's shape.
      input_dtype: its dtype.
      class_names: names of the classes.

    Raises:
      PSpinalError: if something cannot be read, or does not fit the model.
    """
    if init_from is not None:
        return _variables_of_run(init_from, abstract_variables(model, input_shape, input_dtype), class_names)
    if recipe.model.weights is None:
        return {}
    backbone = backbone_variables(recipe.model.backbone, recipe.model.weights)
    return {collection: {"backbone": tree} for collection, tree in backbone.items()}


def _variables_of_run(run: Path, expected: Any, class_names: Sequence[str]) -> dict[str, Any]:
    variables, config = load_variables(run)
    others = config["class_names"] != list(class_names)

    def kept(tree: Any) -> dict[Any, Any]:
        return {path: leaf for path, leaf in flatten_dict(tree).items() if not others or path[1:3] != _OUTPUT}

    found = kept(variables)
    if listed := _misfits(found, kept(expected)):
        raise UsageError(f"--init-from {run} does not fit this model: {listed}")
    if others and is_primary():
        counts = f"{len(config['class_names'])} classes, not the {len(class_names)} of this data"
        say(f"--init-from {run} knows {counts}: the output layer starts anew, all else is kept")
    tree: dict[str, Any] = unflatten_dict(found)
    return tree


_OUTPUT = ("head", "output")


def _misfits(found: dict[Any, Any], expected: dict[Any, Any]) -> str:
    """Which variables, by their paths, have other shapes or are on one side only."""
    # Without the collection: parameters and statistics of a layer have other names.
    there, here = ({"/".join(path[1:]): leaf.shape for path, leaf in leaves.items()} for leaves in (found, expected))
    return ", ".join(differences(there, here, lambda name, old, new: f"{name} is {old} there and {new} here"))
