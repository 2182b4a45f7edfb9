"""What a run's parameters start from: another run, or pretrained weights of the backbone."""

from pathlib import Path
from typing import Any

import jax

from pspinal_jax.errors import UsageError
from pspinal_jax.models.build import build_model
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.restore import load_variables
from pspinal_jax.weights import PRETRAINED, read_state_dict, resnet_variables


def start_variables(
    recipe: Recipe, init_from: Path | None, input_shape: tuple[int, ...], input_dtype: Any, num_classes: int
) -> dict[str, Any]:
    """Variables to start from, by collection and entry; what is not in it starts from the seed.

    Args:
      recipe: may name weights for the backbone.
      init_from: run directory whose selected parameters are taken; they go before the weights.
      input_shape: one example's shape.
      input_dtype: its dtype.
      num_classes: C.

    Raises:
      PSpinalError: if something cannot be read, or does not fit the model.
    """
    model = build_model(recipe, input_shape, num_classes)
    if init_from is not None:
        return {"params": _params_of_run(init_from, model, jax.ShapeDtypeStruct((2, *input_shape), input_dtype))}
    if recipe.model.weights is None:
        return {}
    name = recipe.model.backbone
    source = PRETRAINED[name] if recipe.model.weights == "pretrained" else recipe.model.weights
    backbone = resnet_variables(read_state_dict(source), name)
    return {collection: {"backbone": tree} for collection, tree in backbone.items()}


def _params_of_run(run: Path, model: Any, inputs: jax.ShapeDtypeStruct) -> Any:
    variables, _ = load_variables(run)
    expected = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), inputs)["params"]
    there, here = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
        for leaves in (jax.tree.leaves_with_path(variables["params"]), jax.tree.leaves_with_path(expected))
    )
    if there != here:
        names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
        listed = ", ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in names)
        raise UsageError(f"--init-from {run} does not fit this model: {listed}")
    return variables["params"]
