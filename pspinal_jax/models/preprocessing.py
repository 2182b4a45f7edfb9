"""A recipe's image size, mean and std: what it names, or else its backbone's own."""

import dataclasses

from pspinal_jax.backbones.preprocessing import own_preprocessing
from pspinal_jax.errors import UsageError
from pspinal_jax.recipes.ranges import OWN
from pspinal_jax.recipes.schema import Recipe

Number = float | tuple[float, float, float]


def with_own_preprocessing(recipe: Recipe) -> Recipe:
    """`recipe` with numbers for image size, mean and std: what a run of it uses, and its config.json says.

    Raises:
      UsageError: if the image size is to be the backbone's own, and that has none.
    """
    own, data = own_preprocessing(recipe.model.backbone), recipe.data
    mean, std = normalisation(recipe)
    size = data.image_size
    if size == OWN:
        size = own.image_size
        if size is None:
            raise UsageError(
                f"data.image_size is {OWN}, but the backbone {recipe.model.backbone} has none of its own; give a number"
            )
    return dataclasses.replace(recipe, data=dataclasses.replace(data, mean=mean, std=std, image_size=size))


def normalisation(recipe: Recipe) -> tuple[Number, Number]:
    """Mean and std of `recipe`."""
    own, data = own_preprocessing(recipe.model.backbone), recipe.data
    return own.mean if data.mean is None else data.mean, own.std if data.std is None else data.std
