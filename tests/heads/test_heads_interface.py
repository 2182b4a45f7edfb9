"""Shapes, dtypes, initial values and defaults of every head."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads_support import (
    HEADS,
    KEY,
    abstract_variables,
    apply,
    draw,
    every_head,
    every_implementation,
    initialise,
    random_variables,
    zero_variables,
)

from pspinal_jax import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.layers.linear import relu


@every_implementation
@pytest.mark.parametrize("leading", [(2, 3), (1, 3, 2)])
def test_leading_axes_are_one_batch(implementation, leading):
    head = ProgressiveSpinalHead(4, 3, norm="batch", implementation=implementation)
    variables = random_variables(head, 5, np.random.default_rng(0))
    features = draw(6, 5)

    (flat_logits, flat_new), (logits, new) = (
        apply(head, variables, x, train=True, key=KEY, mutable="batch_stats")
        for x in (features, features.reshape(*leading, 5))
    )
    assert logits.shape == (*leading, 4)
    np.testing.assert_array_equal(logits.reshape(6, 4), flat_logits)
    jax.tree.map(np.testing.assert_array_equal, new, flat_new)


@every_head
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_heads_share_one_call_signature(name, shape):
    head = HEADS[name]()
    variables = random_variables(head, 5, np.random.default_rng(0))
    features = jnp.zeros((*shape, 5))
    for train in (True, False):
        logits = jax.eval_shape(lambda x, train=train: head.apply(variables, x, train, rngs={"dropout": KEY}), features)
        assert logits.shape == (*shape, 4)
    assert list(inspect.signature(type(head).__call__).parameters) == ["self", "features", "train"]


@every_head
def test_no_rows_make_no_logits(name):
    head = HEADS[name]()
    variables = random_variables(head, 5, np.random.default_rng(0))
    assert head.apply(variables, jnp.zeros((2, 0, 5)), train=False).shape == (2, 0, 4)
    assert head.apply(variables, jnp.zeros((2, 0, 5)), train=True, rngs={"dropout": KEY}).shape == (2, 0, 4)


@every_head
@pytest.mark.parametrize(
    ("features", "dtype", "logits"),
    [
        (jnp.float32, None, jnp.float32),
        (jnp.bfloat16, None, jnp.float32),  # the parameters' is the wider
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.float16, jnp.float16, jnp.float16),
    ],
)
def test_dtype_of_the_logits(name, features, dtype, logits):
    head = HEADS[name](dtype=dtype)
    variables = random_variables(head, 5, np.random.default_rng(0))
    features = jax.ShapeDtypeStruct((3, 5), features)
    result = jax.eval_shape(lambda x: head.apply(variables, x, train=True, rngs={"dropout": KEY}), features)
    assert result.dtype == logits


@every_head
def test_parameters_have_param_dtype(name):
    variables = abstract_variables(HEADS[name](param_dtype=jnp.bfloat16), 5)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("bfloat16")}


WIDE_HEADS = {
    "progressive": ProgressiveSpinalHead(num_classes=600, layer_width=600, num_layers=3),
    "spinal": SpinalHead(num_classes=600, layer_width=600, num_layers=3),
    "mlp": MLPHead(num_classes=600, layer_width=600),
    "dense": DenseHead(num_classes=600),
}


@pytest.mark.parametrize("name", WIDE_HEADS)
def test_initial_values_fill_the_range_of_torch_linear(name):
    params = initialise(WIDE_HEADS[name], jnp.ones((1, 50)))["params"]
    arrays = []
    for layer in params.values():
        bound = layer["kernel"].shape[0] ** -0.5
        for values in layer.values():
            values = np.asarray(values)
            assert -bound <= values.min() < -0.98 * bound
            assert bound >= values.max() > 0.98 * bound
            # The spread of a uniform draw is bound / sqrt(3); that of its estimate, 0.45 / sqrt(n) of that.
            assert abs(values.std() * 3**0.5 / bound - 1) < 5 * 0.45 / values.size**0.5
            arrays.append(values.ravel()[:50] / bound)
    # No two of them are one draw.
    assert len(np.unique(np.round(arrays, 4), axis=0)) == len(arrays)


@every_head
def test_initializers_can_be_chosen(name):
    head = HEADS[name](kernel_init=nn.initializers.constant(2.0), bias_init=nn.initializers.constant(3.0))
    params = initialise(head, jnp.ones((1, 5)))["params"]
    for layer in params.values():
        np.testing.assert_array_equal(layer["kernel"], 2)
        np.testing.assert_array_equal(layer["bias"], 3)


def test_defaults():
    head = ProgressiveSpinalHead(num_classes=10, layer_width=64)
    assert (head.num_layers, head.dropout_rate, head.layer_dropout_rate, head.norm) == (4, 0.2, 0.0, None)
    assert head.activation is relu
    assert head.dtype is None and head.param_dtype is jnp.float32
    for missing in ({"num_classes": 10}, {"layer_width": 64}):
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            ProgressiveSpinalHead(**missing)


@every_implementation
def test_default_activation_is_relu_and_another_can_be_chosen(implementation):
    features = draw(8, 4)
    for activation, expected in (({}, np.maximum(features, 0)), ({"activation": jnp.tanh}, np.tanh(features))):
        head = ProgressiveSpinalHead(4, 4, num_layers=1, implementation=implementation, **activation)
        variables = zero_variables(head, 4)
        variables["params"]["layer_1"]["kernel"][:] = np.eye(4)
        variables["params"]["output"]["kernel"][4:] = np.eye(4)
        np.testing.assert_allclose(apply(head, variables, features, train=False), expected, rtol=1e-6)
