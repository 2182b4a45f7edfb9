"""The layout of the head's parameters inside a chunk changes nothing but speed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspinal_jax.models import build_model
from pspinal_jax.recipes import DataConfig, ModelConfig, Recipe
from pspinal_jax.recipes.schema import Card
from pspinal_jax.training.optimizers import make_optimizer
from pspinal_jax.training.state import TrainState, commutes, convert_state, head_layouts


def state_of(optimizer, head="progressive"):
    model = ModelConfig(layer_width=3, num_layers=3, norm="batch", head=head)
    recipe = Recipe(card=Card("r", "none", "m"), data=DataConfig("d"), model=model)
    variables = build_model(recipe, (5,), 4).init(jax.random.key(0), jnp.ones((2, 5)), train=False)
    numbers = iter(range(10_000))
    different = lambda tree: jax.tree.map(lambda leaf: leaf + next(numbers), tree)  # noqa: E731
    params = different(variables["params"])
    opt_state = different(optimizer.init(params))
    return TrainState(jnp.int32(7), params, different(variables["batch_stats"]), opt_state)


OPTIMIZERS = [make_optimizer("sgd", momentum=0.9), make_optimizer("sgd", momentum=0.0), make_optimizer("adamw")]


@pytest.mark.parametrize("layout", ["fused", "packed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["momentum", "sgd", "adamw"])
def test_a_state_comes_back_as_it_went(layout, optimizer):
    state = state_of(optimizer)
    running = convert_state(state, head_layouts(layout))
    assert "layer_1" in state.params["head"] and "layer_1" not in running.params["head"]
    # Momenta go along with their parameters.
    copies = [part for part in jax.tree.leaves(running.opt_state) if part.ndim == 2 and part.shape[0] == 5]
    assert len(copies) == 2 * len(jax.tree.leaves(state.opt_state)) // len(jax.tree.leaves(state.params))
    back = convert_state(running, dict.fromkeys(head_layouts(layout), "tree"))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_weight_decay_spares_biases_in_every_layout():
    optimizer = make_optimizer("adamw", weight_decay=0.5)
    state = state_of(optimizer)
    for layout in ("tree", "fused", "packed"):
        converted = convert_state(state, head_layouts(layout))
        nothing = jax.tree.map(jnp.zeros_like, converted.params)
        direction, _ = optimizer.update(nothing, optimizer.init(converted.params), converted.params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(direction):
            moved = bool(np.any(np.asarray(leaf)))
            assert moved == ("kernel" in path[-1].key), path


def kernels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


@pytest.mark.parametrize(
    ("expected", "optimizer"),
    [
        (True, optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 20))),
        (True, optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))),
        (False, optax.MultiSteps(optax.lars(1e-3), 4).gradient_transformation()),
        (False, optax.adamw(1e-3, weight_decay=1e-6, mask=kernels)),
    ],
)
def test_an_optimizer_that_sees_arrays_apart_keeps_the_documented_tree(expected, optimizer):
    params = {"other": {"kernel": jnp.ones((3, 5))}, **state_of(make_optimizer("sgd")).params}
    assert commutes(optimizer, params, head_layouts("fused")) == expected
