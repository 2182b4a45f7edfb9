"""Recipes: what they are made of, and how their names resolve. Imports neither jax nor anything heavy."""

from pspinal_jax.recipes.registry import list_recipes, load_recipe
from pspinal_jax.recipes.schema import AugmentConfig, Card, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, Recipe

__all__ = [
    "AugmentConfig",
    "Card",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Recipe",
    "list_recipes",
    "load_recipe",
]
