"""The training step of every recipe lowers for TPU; nothing is computed, and no TPU is needed."""

import jax
import numpy as np
import pytest
from jax import export

from pspinal_jax.environment import CONVOLUTIONS_SWITCH
from pspinal_jax.models import build_model, with_default_preprocessing
from pspinal_jax.recipes import list_recipes, load_recipe
from pspinal_jax.runs.build import build_run_programs
from pspinal_jax.training.step import EpochPlan

NUM_EXAMPLES, NUM_CLASSES = 1000, 10
FAST = ("mnist",)
"""The others are slow: they take seconds with VGG-5 and a minute with Wide-ResNet-101-2."""


def input_of(recipe):
    if recipe.card.name in ("features", "linear"):
        return (2048,), np.float32
    side = recipe.data.image_size
    if side is not None:
        return (side, side, 3), np.uint8
    return ((8, 8, 1) if recipe.card.name == "digits" else (28, 28, 1)), np.uint8


def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(recipe):
    """The program that a run of `recipe` trains with, exported for TPU."""
    shape, dtype = input_of(recipe)
    model = build_model(recipe, shape, recipe.data.num_classes or NUM_CLASSES)
    programs = build_run_programs(recipe, model, shape, dtype)
    seed, scalar = abstract((), np.uint32), abstract((), np.int32)
    state, totals = jax.eval_shape(programs.init, seed), jax.eval_shape(programs.zero_totals, seed)
    if recipe.data.image_size is not None:
        side = recipe.data.train_side
        batch = abstract((recipe.batch_size, side, side, 3), dtype), abstract((recipe.batch_size,), np.int32)
        program, arguments = programs.batch_step, (state, totals, seed, abstract((), np.float32), batch)
    else:
        data = abstract((NUM_EXAMPLES, *shape), dtype), abstract((NUM_EXAMPLES,), np.int32)
        steps = NUM_EXAMPLES // recipe.batch_size
        plan = EpochPlan(abstract((NUM_EXAMPLES,), np.int32), abstract((steps,), np.float32))
        program, arguments = programs.chunk, (state, totals, seed, plan, scalar, scalar, data)
    return state, export.export(program, platforms=["tpu"])(*arguments)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in list_recipes()]
)
def test_the_training_step_lowers_for_tpu(name, monkeypatch):
    monkeypatch.setenv(CONVOLUTIONS_SWITCH, "off")  # a TPU's programs have no options of this CPU's
    recipe = with_default_preprocessing(load_recipe(name))
    state, exported = lowered(recipe)
    assert exported.platforms == ("tpu",) and not exported.disabled_safety_checks
    new_state, _ = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(new_state)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)
    ]
    products = ("dot_general", "convolution") if recipe.model.backbone != "none" else ("dot_general",)
    text = exported.mlir_module()
    assert all(f"stablehlo.{product}" in text for product in products)
