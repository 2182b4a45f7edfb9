"""How the head of a recipe for pictures trains where it sees cached features of a frozen backbone."""

import dataclasses
import operator
from collections.abc import Callable

from pspinal_jax.recipes.registry import list_recipes, load_recipe
from pspinal_jax.recipes.schema import Recipe

_TRAINING = ("optimizer", "epochs", "batch_size", "label_smoothing")
_HIDDEN = ("layer_width", "num_layers", "norm", "layer_dropout_rate", "implementation")
"""Settings of hidden layers, of which a linear layer has none."""


def on_cached_features(recipe: Recipe, change: Callable[[Recipe], Recipe]) -> Recipe:
    """`change(recipe)`; where that turns cache_features on, made of a shipped recipe whose head trains on features.

    Its head is then trained as by the recipe `linear`, or by `features` where the change asks for hidden layers: on all
    training data, to the last epoch, unless patience or retrain need a part to look at. What the change sets itself
    stays, and so does the paper's protocol as a whole.

    Args:
      recipe: a recipe as its file has it.
      change: what flags or keywords make of a recipe.
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
    """The recipe whose training the head of `recipe` has on cached features, unless it is told otherwise."""
    return load_recipe("linear" if recipe.model.head == "dense" else "features")


def describe_head_training(recipe: Recipe) -> str:
    """A line on how the head of `recipe` trains on cached features: as in which recipe, and but for what."""
    like, names = recipe_of_head(recipe), [f"optimizer.{field.name}" for field in dataclasses.fields(recipe.optimizer)]
    names += [name for name in _TRAINING if name != "optimizer"]
    values = {name: [operator.attrgetter(name)(each) for each in (recipe, like)] for name in names}
    others = ", ".join(f"{name} {here}" for name, (here, there) in values.items() if here != there)
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
