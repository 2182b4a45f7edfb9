"""`pspinal-jax train RECIPE`: train, or go on with, a run."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.errors import UsageError
from pspinal_jax.recipes import Recipe, list_recipes, load_recipe
from pspinal_jax.runs.options import RunOptions

DEFAULT_RECIPE = "digits"


@dataclasses.dataclass(frozen=True)
class _Arguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    options: Annotated[RunOptions, tyro.conf.arg(name="")]


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    asks_help = not args or args[0] in ("-h", "--help")
    if args and args[0].startswith("-") and not asks_help:
        raise UsageError(f"train takes a recipe before its flags: pspinal-jax train RECIPE {shlex.join(args)}")
    name = DEFAULT_RECIPE if asks_help else args[0]
    if not args:
        raise UsageError(f"train takes a recipe: {', '.join(list_recipes())}, or a path to your own .py file")
    recipe = load_recipe(name)
    flags = args if asks_help else args[1:]
    parsed = parse(
        _Arguments,
        flags,
        prog=f"pspinal-jax train {'RECIPE' if asks_help else name}",
        description=f"Train {name}: {recipe.card.model}, row {recipe.card.row} of the paper's table.",
        default=_Arguments(recipe, RunOptions()),
    )
    return _train(parsed.recipe, parsed.options, ["train", *args])


def _train(recipe: Recipe, options: RunOptions, command: list[str]) -> int:
    from pspinal_jax.runs.results import describe_result
    from pspinal_jax.runs.train import train, work_directory
    from pspinal_jax.runs.trainer import Stopped

    directory = work_directory(recipe, options)
    try:
        result = train(recipe, options)
    except Stopped as stop:
        print(f"stopped by {stop}; the run is saved. Go on with: pspinal-jax {shlex.join(command)}", file=sys.stderr)
        return 0
    print(describe_result(result))
    print(f"results in {directory}: result.json, metrics.jsonl, curves.png, checkpoints/")
    return 0
