"""`pspinal-jax extract-features RECIPE`: the features that the recipe's backbone gives, as an .npz file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.commands.train import take_recipe
from pspinal_jax.errors import UsageError, printable
from pspinal_jax.files import check_target
from pspinal_jax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class _Arguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    output: Path = Path("features.npz")
    """The file to write."""
    init_from: Path | None = None
    """Take the backbone of this run directory in place of --model.weights."""
    workers: int = 0
    """Processes that decode images; 0 for threads of this one."""


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    name, recipe, flags = take_recipe("extract-features", args)
    parsed = parse(
        _Arguments,
        flags,
        prog=f"pspinal-jax extract-features {name}",
        description=f"Write the features that the backbone of {name} gives for its data, for `train features`.",
        example="pspinal-jax extract-features folder --data.path my_pictures --output features.npz",
        default=_Arguments(recipe),
    )
    from pspinal_jax.data import load_data
    from pspinal_jax.environment import enable_compilation_cache
    from pspinal_jax.models import build_model, with_default_preprocessing
    from pspinal_jax.recipes.rules import check_settings, check_settings_for
    from pspinal_jax.runs.features import complete_backbone, extract_features, save_features
    from pspinal_jax.runs.start import start_variables

    recipe = parsed.recipe
    if recipe.model.backbone == "none":
        raise UsageError(f"{name} has no backbone; extract-features takes a recipe of images with one")
    check_target(parsed.output, "--output")
    check_settings(recipe)
    recipe = with_default_preprocessing(recipe)
    data = load_data(recipe.data)
    if data.in_memory:
        raise UsageError(f"{name} holds its data in memory; extract-features takes a recipe of images")
    check_settings_for(recipe, data.source, data.example_shape)
    data = data.with_validation(recipe.data.validation_fraction, recipe.data.split_seed)
    enable_compilation_cache()
    shape, dtype = data.example_shape, data.example_dtype
    model = build_model(recipe, shape, data.num_classes)
    start = start_variables(recipe, model, parsed.init_from, shape, dtype, data.class_names)
    variables = complete_backbone(recipe, model, start, shape, dtype)
    features = extract_features(recipe, model, variables, data, parsed.workers)
    save_features(parsed.output, features)
    print(f"{len(features.train)} training and {len(features.test)} test features in {printable(parsed.output)}")
    print(f"train a head on them with: pspinal-jax train features --data.path {printable(parsed.output)}")
    return 0
