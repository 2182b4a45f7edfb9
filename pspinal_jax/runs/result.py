"""What a run gives: result.json, and the selected parameters that it is about."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from pspinal_jax.checkpoints import read_newest
from pspinal_jax.checkpoints.checksum import json_checksum, tree_checksums
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import differences
from pspinal_jax.models import abstract_variables, build_model, count_features, count_parameters
from pspinal_jax.recipes.schema import AugmentConfig, Recipe
from pspinal_jax.recipes.typed import typed
from pspinal_jax.runs.build import RunSetup, selected_by
from pspinal_jax.runs.directory import RunDirectory, load_recipe_of
from pspinal_jax.runs.scores import averages, scores_by_class, summary
from pspinal_jax.training.costs import total_costs
from pspinal_jax.training.loop import Trainer
from pspinal_jax.training.programs import of_seed
from pspinal_jax.training.sharding import make_mesh, replicated_on
from pspinal_jax.training.stages import TrainingProgress
from pspinal_jax.weights.variables import first_not_finite, read_variables

BACKBONE = "backbone.safetensors"


def head_recipe(recipe: Recipe) -> Recipe:
    """What is left of `recipe` to train on cached features: the same head, data and schedule, no backbone."""
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(
            recipe.data, image_size=None, resize=None, fit="squash", augment="none", mean=0.0, std=1.0
        ),
        augment=AugmentConfig(mixup=recipe.augment.mixup),
        optimizer=dataclasses.replace(recipe.optimizer, backbone_rate=1.0),
        model=dataclasses.replace(recipe.model, backbone="none", weights=None),
        freeze="none",
        cache_features=False,
        feature_views=0,
    )


def add_backbone(directory: RunDirectory, variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of a run's head, completed by its frozen backbone.

    Raises:
      PSpinalError: if the backbone's file is missing or damaged.
    """
    directory.verify(BACKBONE)
    trees = read_variables(directory.path / BACKBONE)
    return {name: {**tree, **({"backbone": trees[name]} if name in trees else {})} for name, tree in variables.items()}


def make_result(trainer: Trainer, setup: RunSetup, directory: RunDirectory) -> dict[str, Any]:
    """The content of result.json. Under the validation protocol this is where the test split is evaluated, once.

    Raises:
      Stopped: after SIGINT or SIGTERM; the run is saved.
    """
    progress, recipe, trees = trainer.progress, setup.recipe, trainer.seed_states.trees()
    result: dict[str, Any] = {
        "recipe": recipe.card.name,
        "row": recipe.card.row,
        "protocol": recipe.protocol,
        "selection": describe_selection(setup),
        "head": recipe.model.head,
        "seeds": trainer.seed_states.seeds,
    }
    paper = recipe.protocol == "paper"
    test = setup.splits["test"]
    sums = test.evaluate(partial(trainer.seed_states.evaluate, best=not paper), trainer.stop_if_asked)
    if paper:
        result["test_accuracy"] = summary(progress.last_accuracy)
        result["last_test_accuracy"] = summary(progress.last_accuracy)
        result["best_on_test_accuracy"] = summary(progress.best_accuracy)
        result["best_on_test_epoch"] = progress.best_epoch
    else:
        result["test_accuracy"] = summary((sums["correct"] / test.count).tolist())
        validation = progress.selected_accuracy or progress.best_accuracy
        loss = [each for each in progress.selected_loss or progress.best_loss if each is not None]
        if validation:
            result[f"validation_{selected_by(recipe)}"] = summary(validation)
        if loss and len(loss) == len(validation):
            result["validation_loss"] = summary(loss)
        result["selected_epoch"] = progress.selected_epoch or progress.best_epoch
    if recipe.patience:
        stopped = progress.lines - progress.epoch if progress.selected_epoch else progress.epoch
        result["early_stopping"] = {"patience": recipe.patience, "epochs": stopped}
    seeds_as = "one program" if setup.programs.vectorized else "one after the other"
    names = directory.config()["class_names"]
    seeds = [scores_by_class(test.labels, predictions, names) for predictions in sums["predictions"]]
    return result | {
        "test_loss": summary((sums["loss"] / test.count).tolist()),
        "test_balanced_accuracy": summary([averages(classes)["balanced_accuracy"] for classes in seeds]),
        "test_macro_f1": summary([averages(classes)["macro_f1"] for classes in seeds]),
        "test_classes": [
            {"name": same[0]["name"], "support": same[0]["support"], "recall": [each["recall"] for each in same]}
            for same in zip(*seeds, strict=True)
        ],
        "selected_checksum": selected_checksum(trees if paper else trees["best"]),
        "published_accuracy_percent": published_accuracy(setup),
        "parameters": count_parameters(trees["params"]) // recipe.num_seeds,
        "train_examples": len(trainer.stage.subset),
        "test_examples": test.count,
        "epochs": recipe.epochs,
        "seconds": round(progress.total_seconds, 3),
        "compile_seconds": round(sum(line.get("compile_seconds", 0.0) for line in directory.metrics()), 3),
        "costs": total_costs(directory.metrics()),
        "seeds_as": f"{progress.processes} processes side by side" if progress.processes > 1 else seeds_as,
        "device": device(),
        "versions": versions(),
    }


def describe_selection(setup: RunSetup) -> str:
    """How the parameters were chosen whose test accuracy is reported."""
    recipe = setup.recipe
    if recipe.protocol == "paper":
        return (
            "the paper's protocol: trained on all training data, test accuracy of the last epoch; best_on_test is "
            "selected on the test split"
        )
    if "validation" not in setup.splits:
        return "last epoch, trained on all training data"
    held = setup.splits["validation"].count
    again = ", then trained again on all training data for as many epochs" if recipe.retrain else ""
    by = " by balanced accuracy" if selected_by(recipe) == "balanced_accuracy" else ""
    return f"best epoch{by} on {held} held-out training examples{again}"


def published_accuracy(setup: RunSetup) -> float | None:
    """The paper's figure, where the run is on the data set that it was measured on; None for other data."""
    card, data = setup.recipe.card, setup.recipe.data
    known = CATALOGUE.get(data.name.split(":")[0])
    sizes = (setup.examples.count, setup.splits["test"].count)
    is_it = known is not None and known.row == card.row and (data.path is None or known.sizes == sizes)
    return card.published_accuracy if is_it else None


def _best_seed(recipe: Recipe, progress: TrainingProgress) -> int:
    """Index of the seed that does best on validation, as epochs are selected (see `improves`); of equals the first.

    Without validation it is the first; nothing is ever chosen on test.
    """
    accuracy = progress.selected_accuracy or progress.best_accuracy
    losses = progress.selected_loss or progress.best_loss or [None] * len(accuracy)

    def score(seed: int) -> tuple[float, float]:
        loss = losses[seed]
        return accuracy[seed], -np.inf if loss is None else -np.nan_to_num(loss, nan=np.inf)

    return 0 if recipe.protocol == "paper" else max(range(len(accuracy)), key=score, default=0)


def selected_checksum(selected: Any) -> str:
    """A checksum of the parameters and running statistics that a result is of, those of all seeds."""
    return json_checksum({name: tree_checksums(selected.get(name, {})) for name in ("params", "batch_stats")})


class Loaded(NamedTuple):
    """What a run's result is of.

    Attributes:
      variables: {'params': .., 'batch_stats': ..}, as the run's model applies them.
      config: what config.json holds.
      seed_index: which of the run's seeds they are of.
    """

    variables: dict[str, Any]
    config: dict[str, Any]
    seed_index: int


def load_variables(run: Path, seed_index: int | None = None) -> Loaded:
    """The parameters and running statistics that a run's result stands for: selected, or the last (paper's protocol).

    Args:
      run: a run directory.
      seed_index: which of the run's seeds; by default the best on validation.

    Raises:
      RunError: if `run` is not a run directory, its newest checkpoint is damaged or missing, or the parameters are not
        those that result.json is about, or not finite.
      UsageError: if the run has no such seed.
    """
    directory = RunDirectory(run)
    config, result = directory.config(), directory.result()
    recipe, shape, dtype = load_recipe_of(config), tuple(config["input_shape"]), config["input_dtype"]
    num_classes, count = len(config["class_names"]), recipe.num_seeds
    if seed_index is not None and not 0 <= seed_index < count:
        raise UsageError(f"seed_index is {seed_index}, expected 0 .. {count - 1}: the run has {count} seeds")
    try:
        whole = shapes = abstract_variables(build_model(recipe, shape, num_classes), shape, dtype)
        if recipe.cache_features:
            features = (count_features(recipe, shape),)
            shapes = abstract_variables(build_model(head_recipe(recipe), features, num_classes), features)
    except (UsageError, TypeError, ValueError, OverflowError) as error:  # flax and jax raise these for odd sizes
        raise RunError(f"{directory.config_path} describes no model: {error}; train in another workdir") from error
    # Under the paper's protocol the result is the last epoch's; its "best" was selected on the test split.
    takes_last = recipe.protocol == "paper"
    sharding, lead = replicated_on(make_mesh()), (count,) if count > 1 else ()

    def expected(position: dict[str, Any]) -> dict[str, Any]:
        if not any(typed("position", position, TrainingProgress).best_epoch):
            raise RunError(f"{run} has not finished an epoch yet; run `train` again to resume it")
        trees = {name: shapes.get(name, {}) for name in ("params", "batch_stats")}
        trees = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(lead + leaf.shape, leaf.dtype, sharding=sharding), trees)
        return trees if takes_last else {"best": trees}

    trees, position = read_newest(directory.checkpoints_path, expected)
    selected, progress = trees if takes_last else trees["best"], TrainingProgress(**position)
    if result is not None and not _is_about(result, selected, progress):
        raise RunError(
            f"the newest checkpoint in {directory.checkpoints_path} does not hold the parameters of result.json: it "
            "was replaced, or a newer one is missing; train in another workdir"
        )
    index = _best_seed(recipe, progress) if seed_index is None else seed_index
    variables = selected if count == 1 else of_seed(selected, index)
    if recipe.cache_features:
        variables = add_backbone(directory, variables)
        if listed := misfits(flatten_dict(variables), flatten_dict(whole)):
            raise RunError(f"{run / BACKBONE} does not fit its config.json: {listed}; train in another workdir")
    if (name := first_not_finite(variables)) is not None:
        raise RunError(
            f"{run} holds parameters that are not finite, {name} first: training diverged; train again in another "
            "workdir with a lower optimizer.learning_rate"
        )
    return Loaded(variables, config, index)


def _is_about(result: dict[str, Any], selected: Any, progress: TrainingProgress) -> bool:
    """Whether `result` is the result of the parameters `selected`, of all seeds."""
    if "selected_checksum" in result:
        return bool(result["selected_checksum"] == selected_checksum(selected))
    if "selected_epoch" in result:  # an older run without that checksum
        return bool(result["selected_epoch"] == (progress.selected_epoch or progress.best_epoch))
    return bool(result["test_accuracy"]["each"] == progress.last_accuracy)


def misfits(found: dict[Any, Any], expected: dict[Any, Any]) -> str:
    """Which variables, by their paths, have other shapes or are on one side only."""
    # Without the collection: parameters and statistics of a layer have other names.
    old, new = ({"/".join(path[1:]): leaf.shape for path, leaf in leaves.items()} for leaves in (found, expected))
    return ", ".join(differences(old, new, lambda name, was, now: f"{name} is {was}, expected {now}"))
