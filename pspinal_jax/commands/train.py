"""`train RECIPE` and `extract-features RECIPE`, which take a recipe, and `recipes`, which lists them."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pspinal_jax.commands import naming_flags, table
from pspinal_jax.commands.parse import HELP, HELP_ALL, NoArguments, parse
from pspinal_jax.distributed import is_primary, joined
from pspinal_jax.errors import UsageError, printable
from pspinal_jax.files import check_target, expanded
from pspinal_jax.progress import say
from pspinal_jax.recipes import Recipe, list_recipes, load_recipe
from pspinal_jax.recipes.schema import ProcessOptions, RunOptions
from pspinal_jax.training.signals import Stopped, leave_at_once

DEFAULT_RECIPE = "digits"

COMMON_FLAGS = {
    "data": (
        *("data.path", "data.name", "data.augment", "data.image-size", "data.fit", "data.num-classes"),
        *("data.num-validation", "data.validation-fraction", "data.test-fraction", "data.labels", "data.group"),
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
"""The flags that `--help` shows, by topic and the most used first; `--help-all` shows every flag."""

_EXAMPLES = {
    "folder": "--data.path my_pictures --freeze backbone --cache-features",
    "features": "--data.path features.npz --num-seeds 3",
}
"""The flags of the example in a recipe's help, by the recipe's data."""


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Arguments of `train`."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    options: Annotated[RunOptions, tyro.conf.arg(name="")]
    processes: Annotated[ProcessOptions, tyro.conf.arg(name="")]
    exit_status_when_stopped: int = 0
    """Exit status after SIGTERM or Ctrl-C, when the run can resume. Workflow engines that take 0 for finished need
    another one, such as 143."""


@dataclasses.dataclass(frozen=True)
class ExtractArguments:
    """Arguments of `extract-features`."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    output: Path = Path("features.npz")
    """File to write."""
    init_from: Path | None = None
    """Use the backbone of this run directory instead of --model.weights."""
    workers: int = 0
    """Number of processes that decode images; 0 for threads."""


def train(args: Sequence[str]) -> int:
    """Train a recipe, or resume an unfinished run of it; returns the exit status."""
    name, recipe, flags = _take_recipe("train", args)

    def parsed(recipe: Recipe) -> TrainArguments:
        card = recipe.card
        row = "" if card.row == "none" else f", for the row {card.row} of the paper's table"
        arguments: TrainArguments = parse(
            TrainArguments,
            flags,
            f"train {name}",
            _EXAMPLES.get(recipe.data.name, "--num-seeds 3"),
            description=f"Train the recipe {card.name}: {card.model}{row}.",
            groups=COMMON_FLAGS,
            default=TrainArguments(recipe, RunOptions(), ProcessOptions()),
        )
        return arguments

    arguments = parsed(recipe)
    again = f"Resume with: pspinal-jax train {shlex.join(args)}"
    if not 0 <= arguments.exit_status_when_stopped < 256:
        raise UsageError(f"--exit-status-when-stopped is {arguments.exit_status_when_stopped}, expected 0 .. 255")
    with joined(arguments.processes), naming_flags():
        try:
            with leave_at_once(f"nothing is lost. {again}", arguments.exit_status_when_stopped):
                from pspinal_jax.runs import run as runs  # only now: these take seconds
                from pspinal_jax.runs.report import describe_result

                changed = arguments.recipe
                if changed.cache_features:
                    changed = runs.resolve(recipe, lambda other: parsed(other).recipe, arguments.options)
                done = runs.train(changed, **vars(arguments.options))
        except Stopped as stop:
            if is_primary():
                say(f"stopped by {stop}; the run is saved. {again}")
            return arguments.exit_status_when_stopped
        if is_primary():
            print(describe_result(done.result))
            print(f"results in {printable(done.path)}: result.json, metrics.jsonl, curves.png, checkpoints/")
    return 0


def extract_features(args: Sequence[str]) -> int:
    """Write the features of a recipe's images, computed by its backbone; returns the exit status."""
    name, recipe, flags = _take_recipe("extract-features", args)
    parsed = parse(
        ExtractArguments,
        flags,
        f"extract-features {name}",
        "--data.path my_pictures --output features.npz",
        description=f"Compute features of the data of {name} with its backbone, and write them for `train features`.",
        default=ExtractArguments(recipe),
    )
    from pspinal_jax.environment import enable_compilation_cache
    from pspinal_jax.models import build_model
    from pspinal_jax.runs.start import complete_backbone, extract_features, save_features, start_variables
    from pspinal_jax.runs.train import load_examples

    if parsed.recipe.model.backbone == "none":
        raise UsageError(f"{name} has no backbone; extract-features takes a recipe of images with one")
    check_target(parsed.output, "--output")
    recipe, data = load_examples(parsed.recipe, RunOptions(init_from=parsed.init_from, workers=parsed.workers))
    if data.in_memory:
        raise UsageError(f"{name} holds its data in memory; extract-features takes a recipe of images")
    enable_compilation_cache()
    model = build_model(recipe, data.example_shape, data.num_classes)
    variables = complete_backbone(recipe, model, start_variables(recipe, model, parsed.init_from, data), data)
    features = extract_features(recipe, model, variables, data, parsed.workers)
    save_features(parsed.output, features)
    print(f"{len(features.train)} training and {len(features.test)} test features in {printable(parsed.output)}")
    print(f"train a head on them with: pspinal-jax train features --data.path {printable(parsed.output)}")
    return 0


def recipes(args: Sequence[str]) -> int:
    """Print a table of the recipes; returns the exit status."""
    description = "Print each recipe's name, row of the paper's table, model, and the paper's accuracy."
    parse(NoArguments, args, "recipes", "", description=description)
    rows = [("recipe", "row", "model", "protocol", "paper's accuracy")]
    for name in list_recipes():
        recipe = load_recipe(name)
        published = recipe.card.published_accuracy
        accuracy = "-" if published is None else f"{published} %"
        rows.append((name, recipe.card.row, recipe.card.model, recipe.protocol, accuracy))
    print(table(rows))
    return 0


def _take_recipe(command: str, args: Sequence[str]) -> tuple[str, Recipe, Sequence[str]]:
    """The recipe's name, the recipe, and the flags in `args`; for help without a recipe, the default recipe.

    Raises:
      UsageError: if the first argument is missing, or is data instead of a recipe.
    """
    if args and args[0] in (*HELP, HELP_ALL):
        return DEFAULT_RECIPE, load_recipe(DEFAULT_RECIPE), args
    if not args or args[0].startswith("-"):
        names = ", ".join(list_recipes())
        raise UsageError(f"{command} takes a recipe before its flags: {names}, or a path to your own .py file")
    name, *flags = args
    if name not in list_recipes() and not name.endswith(".py") and expanded(name).exists():
        data = printable(shlex.quote(name))
        raise UsageError(f"{data} is not a recipe; give its name first, and then the data: --data.path {data}")
    return name, load_recipe(name), flags
