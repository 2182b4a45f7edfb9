"""`pspinal-jax train RECIPE`: train, or go on with, a run."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.distributed.coordination import is_primary
from pspinal_jax.errors import UsageError
from pspinal_jax.recipes import Recipe, list_recipes, load_recipe
from pspinal_jax.recipes.options import ProcessOptions, RunOptions
from pspinal_jax.runs.signals import Stopped, leave_at_once

DEFAULT_RECIPE = "digits"


@dataclasses.dataclass(frozen=True)
class _Arguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    options: Annotated[RunOptions, tyro.conf.arg(name="")]
    processes: Annotated[ProcessOptions, tyro.conf.arg(name="")]


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    name, recipe, flags = take_recipe("train", args)
    parsed = parse(
        _Arguments,
        flags,
        prog=f"pspinal-jax train {name}",
        description=f"Train {recipe.card.name}: {recipe.card.model}, row {recipe.card.row} of the paper's table.",
        default=_Arguments(recipe, RunOptions(), ProcessOptions()),
    )
    from pspinal_jax.distributed.join import joined

    with joined(parsed.processes):
        return _train(parsed.recipe, parsed.options, ["train", *args])


def take_recipe(command: str, args: Sequence[str]) -> tuple[str, Recipe, Sequence[str]]:
    """The recipe's name, the recipe and the flags in `args`; 'RECIPE' and the default one where help is asked for.

    Raises:
      UsageError: if there is no recipe in front of the flags.
    """
    if args and args[0] in ("-h", "--help"):
        return "RECIPE", load_recipe(DEFAULT_RECIPE), args
    if not args:
        raise UsageError(f"{command} takes a recipe: {', '.join(list_recipes())}, or a path to your own .py file")
    if args[0].startswith("-"):
        raise UsageError(f"{command} takes a recipe before its flags: pspinal-jax {command} RECIPE {shlex.join(args)}")
    return args[0], load_recipe(args[0]), args[1:]


def _train(recipe: Recipe, options: RunOptions, command: list[str]) -> int:
    again = f"Go on with: pspinal-jax {shlex.join(command)}"
    try:
        with leave_at_once(f"nothing is lost. {again}"):
            from pspinal_jax.runs.result import describe_result  # only now: these take seconds
            from pspinal_jax.runs.run import train

            run = train(recipe, **vars(options))
    except Stopped as stop:
        if is_primary():
            print(f"stopped by {stop}; the run is saved. {again}", file=sys.stderr)
        return 0
    if is_primary():
        print(describe_result(run.result))
        print(f"results in {run.path}: result.json, metrics.jsonl, curves.png, checkpoints/")
    return 0
