"""From a recipe's name, or the path of a user's own file, to the recipe."""

import difflib
import importlib.util
from pathlib import Path

from pspinal_jax.errors import PSpinalError, UsageError
from pspinal_jax.files import expanded, shipped
from pspinal_jax.recipes.schema import Recipe


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
    if name.endswith(".py"):
        path = expanded(name)
        if not path.is_file():
            raise UsageError(f"recipe file {name} does not exist")
        return _load_file(path)
    names = list_recipes()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(
            f"unknown recipe {name!r}; {hint}There are: {', '.join(names)}, or a path to your own .py file"
        )
    return _load_file(shipped("configs") / f"{name.replace('-', '_')}.py")


def _load_file(path: Path) -> Recipe:
    spec = importlib.util.spec_from_file_location(f"pspinal_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"recipe file {path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except PSpinalError as error:
        raise UsageError(f"recipe file {path}: {error}") from error
    except Exception as error:  # a user's own file may do anything
        raise UsageError(f"recipe file {path} fails with {type(error).__name__}: {error}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise UsageError(f"recipe file {path} must define `recipe = pspinal_jax.recipes.Recipe(...)`")
    return recipe
