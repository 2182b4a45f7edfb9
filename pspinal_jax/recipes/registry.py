"""Recipes by name or from a user's own file, and the recipe that a head on cached features is trained with."""

import dataclasses
import operator
import runpy
from collections.abc import Callable

from pspinal_jax.errors import PSpinalError, UsageError
from pspinal_jax.files import expanded, shipped
from pspinal_jax.recipes.schema import Recipe

_TRAINING = ("optimizer", "epochs", "batch_size", "label_smoothing")
_HIDDEN = ("layer_width", "num_layers", "norm", "layer_dropout_rate", "implementation")
"""Settings of hidden layers, of which a linear layer has none."""


def list_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem.replace("_", "-") for path in shipped("configs").glob("*.py") if path.stem != "__init__")


def load_recipe(name: str) -> Recipe:
    """The recipe of that name, or the one that the .py file at that path defines as `recipe`.

    Args:
      name: a name out of `list_recipes`, or a path that ends in ``.py``.

    Raises:
      UsageError: if there is no such recipe or file, or the file defines none.
    """
    path, names = expanded(name), list_recipes()
    if not name.endswith(".py"):
        if name not in names:
            raise UsageError(f"unknown recipe {name!r}; there are: {', '.join(names)}, or a path to your own .py file")
        path = shipped("configs") / f"{name.replace('-', '_')}.py"
    elif not path.is_file():
        raise UsageError(f"recipe file {name} does not exist")
    try:
        recipe = runpy.run_path(str(path)).get("recipe")
    except PSpinalError as error:
        raise UsageError(f"recipe file {path}: {error}") from error
    except Exception as error:  # a user's own file may do anything
        raise UsageError(f"recipe file {path} fails with {type(error).__name__}: {error}") from error
    if not isinstance(recipe, Recipe):
        raise UsageError(f"recipe file {path} must define `recipe = pspinal_jax.recipes.Recipe(...)`")
    return recipe


def on_cached_features(recipe: Recipe, change: Callable[[Recipe], Recipe]) -> Recipe:
    """`change(recipe)`, with the training settings of a recipe on features if the change turns cache_features on.

    The head is then trained as in the recipe `linear` or, if the change asks for hidden layers, as in `features`: on
    all training data, to the last epoch, unless patience or retrain need held-out examples. Fields that the change sets
    take precedence, and the paper's protocol is left unchanged.

    Args:
      recipe: a shipped recipe.
      change: function that applies flags or keywords to a recipe.
    """
    asked = change(recipe)
    shipped = recipe.card.name in list_recipes()
    if recipe.cache_features or not asked.cache_features or asked.protocol == "paper" or not shipped:
        return asked
    holds_out = asked.patience > 0 or asked.retrain
    if all(getattr(asked.model, name) == getattr(recipe.model, name) for name in _HIDDEN):
        linear = change(_trained_as(load_recipe("linear"), recipe, holds_out))
        if linear.model.head == "dense":
            return linear
    return change(_trained_as(load_recipe("features"), recipe, holds_out))


def recipe_of_head(recipe: Recipe) -> Recipe:
    """The recipe that the head of `recipe` is trained with on cached features by default."""
    return load_recipe("linear" if recipe.model.head == "dense" else "features")


def describe_head_training(recipe: Recipe) -> str:
    """A line on how the head of `recipe` is trained on cached features: the recipe, and the exceptions."""
    like, names = recipe_of_head(recipe), [f"optimizer.{field.name}" for field in dataclasses.fields(recipe.optimizer)]
    values = {name: operator.attrgetter(name) for name in (*names, *_TRAINING[1:])}
    others = ", ".join(f"{name} {get(recipe)}" for name, get in values.items() if get(recipe) != get(like))
    return (
        f"cached features: the head trains as in the recipe {like.card.name}{f', but for {others}' if others else ''}"
    )


def _trained_as(like: Recipe, recipe: Recipe, holds_out: bool) -> Recipe:
    """`recipe` with the training of `like`, and with its head if that is linear; what its owner changed stays."""
    shipped = load_recipe(recipe.card.name)
    taken = {name: getattr(like, name) for name in _TRAINING if getattr(recipe, name) == getattr(shipped, name)}
    if like.model.head == "dense" and recipe.model == shipped.model:
        taken["model"] = dataclasses.replace(recipe.model, head="dense", dropout_rate=like.model.dropout_rate)
    if not holds_out and recipe.data.validation_fraction == shipped.data.validation_fraction:
        taken["data"] = dataclasses.replace(recipe.data, validation_fraction=0.0)
    return dataclasses.replace(recipe, **taken)
