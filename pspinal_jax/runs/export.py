"""`export`: a run's selected parameters as a program that JAX alone runs."""

import dataclasses
from pathlib import Path
from typing import Any

from pspinal_jax.environment import versions
from pspinal_jax.errors import RunError
from pspinal_jax.export.directory import check_free, write_export
from pspinal_jax.export.program import export_classifier
from pspinal_jax.files import expanded
from pspinal_jax.models import build_model, count_parameters
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.directory import RunDirectory, load_recipe_of
from pspinal_jax.runs.restore import load_variables
from pspinal_jax.runs.result import best_seed_index


def export_run(run: str | Path, output: str | Path | None = None, seed_index: int | None = None) -> Path:
    """Write the export of a finished run; see `pspinal_jax.export.directory` for its files.

    Args:
      run: run directory.
      output: the directory to write; by default ``run / "export"``.
      seed_index: which of the run's seeds; by default the best on validation.

    Returns:
      The directory written.

    Raises:
      PSpinalError: if `run` is no finished run, or `output` cannot be written or holds anything but an export.
    """
    run = expanded(run)
    output = run / "export" if output is None else expanded(output)
    directory = RunDirectory(run)
    config = directory.config()
    result = directory.result()
    if result is None:
        raise RunError(f"{run} is not finished: it has no result.json; run `train` again to go on")
    check_free(output)
    if seed_index is None:
        seed_index = best_seed_index(config, result, directory.metrics())
    variables, config = load_variables(run, seed_index)
    recipe, shape = load_recipe_of(config), tuple(config["input_shape"])
    model = build_model(_for_inference(recipe), shape, len(config["class_names"]))
    exported = export_classifier(model, variables, shape, config["input_dtype"], transposed=recipe.data.transposed)
    write_export(output, exported, variables, _describe(recipe, seed_index, variables, config, result))
    return output


def _for_inference(recipe: Recipe) -> Recipe:
    """`recipe` with a model that computes on the documented tree in the layout that suits it."""
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, implementation="auto", remat=False))


def _describe(
    recipe: Recipe, seed_index: int, variables: dict[str, Any], config: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
    names = config["class_names"]
    return {
        "class_names": names,
        "input": {
            "shape": ["N", *config["input_shape"]],
            "dtype": config["input_dtype"],
            **({"fit": recipe.data.fit} if recipe.data.fit != "squash" else {}),
            **({"columns": config["columns"]} if config.get("columns") else {}),
        },
        "output": {"shape": ["N", len(names)], "dtype": "float32", "holds": "probabilities"},
        "recipe": recipe.card.name,
        "backbone": recipe.model.backbone,
        "head": recipe.model.head,
        "parameters": count_parameters(variables["params"]),
        "seed": recipe.seed + seed_index,
        "test_accuracy": result["test_accuracy"]["each"][seed_index],
        "selection": result["selection"],
        # For `evaluate`: how the data was read, and its checksum; not where it lay.
        "data": {
            "settings": config["identity"]["data"],
            "protocol": recipe.protocol,
            "fingerprint": config["identity"]["data_fingerprint"],
        },
        "trained_with": config["versions"],
        "exported_with": versions(),
    }
