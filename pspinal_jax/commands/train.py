"""`pspinal-jax train RECIPE`: train, or go on with, a run."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Annotated

import tyro

from pspinal_jax.commands import naming_flags
from pspinal_jax.commands.parse import HELP, HELP_ALL, parse
from pspinal_jax.distributed import is_primary
from pspinal_jax.errors import UsageError, printable
from pspinal_jax.files import expanded
from pspinal_jax.progress import say
from pspinal_jax.recipes import Recipe, list_recipes, load_recipe
from pspinal_jax.recipes.schema import ProcessOptions, RunOptions
from pspinal_jax.training.signals import Stopped, leave_at_once

DEFAULT_RECIPE = "digits"

MOST_USED = {
    "data": (
        *("data.path", "data.name", "data.augment", "data.image-size", "data.fit", "data.num-classes"),
        *("data.num-validation", "data.validation-fraction", "data.test-fraction"),
    ),
    "model": (
        *("model.backbone", "model.weights", "freeze", "cache-features", "model.head", "model.layer-width"),
        *("model.num-layers", "model.dropout-rate"),
    ),
    "training": (
        *("epochs", "batch-size", "optimizer.learning-rate", "optimizer.name", "optimizer.weight-decay"),
        *("optimizer.schedule", "label-smoothing", "class-weights", "patience"),
    ),
    "run": ("workdir", "num-seeds", "seed", "init-from", "dtype", "tensorboard", "protocol"),
}
"""What `--help` shows, by what people do and the most used first; `--help-all` shows every flag."""


@dataclasses.dataclass(frozen=True)
class _Arguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    options: Annotated[RunOptions, tyro.conf.arg(name="")]
    processes: Annotated[ProcessOptions, tyro.conf.arg(name="")]


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    name, recipe, flags = take_recipe("train", args)

    def parsed(recipe: Recipe) -> _Arguments:
        arguments: _Arguments = parse(
            _Arguments,
            flags,
            prog=f"pspinal-jax train {name}",
            description=f"Train {recipe.card.name}: {recipe.card.model}, row {recipe.card.row} of the paper's table.",
            example=_example(name, recipe),
            groups=MOST_USED,
            default=_Arguments(recipe, RunOptions(), ProcessOptions()),
        )
        return arguments

    arguments = parsed(recipe)
    from pspinal_jax.distributed import joined

    with joined(arguments.processes), naming_flags():
        changed = arguments.recipe
        if changed.cache_features:
            from pspinal_jax.runs.run import resolve

            changed = resolve(recipe, lambda other: parsed(other).recipe, arguments.options)
        return _train(changed, arguments.options, ["train", *args])


def take_recipe(command: str, args: Sequence[str]) -> tuple[str, Recipe, Sequence[str]]:
    """The recipe's name, the recipe and the flags in `args`; 'RECIPE' and the default one where help is asked for.

    Raises:
      UsageError: if there is no recipe in front of the flags.
    """
    if args and args[0] in (*HELP, HELP_ALL):
        return "RECIPE", load_recipe(DEFAULT_RECIPE), args
    if not args:
        raise UsageError(f"{command} takes a recipe: {', '.join(list_recipes())}, or a path to your own .py file")
    if args[0].startswith("-"):
        raise UsageError(f"{command} takes a recipe before its flags: pspinal-jax {command} RECIPE {shlex.join(args)}")
    _refuse_data(command, args[0])
    return args[0], load_recipe(args[0]), args[1:]


def _refuse_data(command: str, word: str) -> None:
    """Raise UsageError if data stands where a recipe is expected."""
    path = expanded(word)
    if word in list_recipes() or path.suffix == ".py" or not path.exists():
        return
    kind, recipe = ("a folder", "folder") if path.is_dir() else ("a file", "RECIPE")
    meant = printable(f"pspinal-jax {command} {recipe} --data.path {shlex.quote(word)}")
    raise UsageError(f"{printable(word)} is no recipe but {kind}; did you mean {meant}?")


def _example(name: str, recipe: Recipe) -> str:
    if recipe.data.name == "folder":
        return f"pspinal-jax train {name} --data.path my_pictures --freeze backbone --cache-features"
    data = " --data.path features.npz" if recipe.data.name == "features" else ""
    return f"pspinal-jax train {DEFAULT_RECIPE if name == 'RECIPE' else shlex.quote(name)}{data} --num-seeds 3"


def _train(recipe: Recipe, options: RunOptions, command: list[str]) -> int:
    again = f"Go on with: pspinal-jax {shlex.join(command)}"
    try:
        with leave_at_once(f"nothing is lost. {again}"):
            from pspinal_jax.runs.report import describe_result  # only now: these take seconds
            from pspinal_jax.runs.run import train

            run = train(recipe, **vars(options))
    except Stopped as stop:
        if is_primary():
            say(f"stopped by {stop}; the run is saved. {again}")
        return 0
    if is_primary():
        print(describe_result(run.result))
        print(f"results in {printable(run.path)}: result.json, metrics.jsonl, curves.png, checkpoints/")
    return 0
