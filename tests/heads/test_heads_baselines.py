"""The baselines: SpinalNet's head, the MLP and the linear one."""

import jax
import numpy as np
import pytest
from heads_support import (
    HEADS,
    KEY,
    apply,
    assert_fraction,
    copy_features,
    draw,
    identity,
    numpy_norm,
    random_variables,
    zero_variables,
)

from pspinal_jax import DenseHead, MLPHead, SpinalHead
from pspinal_jax.heads.baselines import matching_width


def spinal_showing(num_features, num_layers, **attributes):
    """A spinal head whose logits are [y_1 .. y_L]."""
    width = num_features // 2
    head = SpinalHead(num_layers * width, width, num_layers, activation=identity, **attributes)
    variables = zero_variables(head, num_features)
    variables["params"]["output"]["kernel"][:] = np.eye(num_layers * width)
    return head, variables


def test_spinal_layers_take_turns_at_the_halves():
    head, variables = spinal_showing(6, 4, dropout_rate=0.0)
    copy_features(variables, [1, 2, 3, 4], 3)
    features = draw(5, 6)
    a, b = features[:, :3], features[:, 3:]
    logits = apply(head, variables, features, train=True)
    np.testing.assert_allclose(logits, np.concatenate([a, b, a, b], 1), rtol=1e-6)


def test_spinal_layers_see_the_layer_before_and_the_output_all_of_them():
    head, variables = spinal_showing(6, 4, dropout_rate=0.0)
    params = variables["params"]
    copy_features(variables, [1], 3)
    for i in (2, 3, 4):
        params[f"layer_{i}"]["kernel"][3:] = 10 * np.eye(3)
    a = draw(5, 6)
    logits = apply(head, variables, a, train=True)
    np.testing.assert_allclose(logits, np.concatenate([a[:, :3] * 10**i for i in range(4)], 1), rtol=1e-6)
    assert {name: layer["kernel"].shape for name, layer in params.items()} == {
        "layer_1": (3, 3),
        "layer_2": (6, 3),
        "layer_3": (6, 3),
        "layer_4": (6, 3),
        "output": (12, 12),
    }


def test_spinal_splits_an_odd_number_of_features():
    head = SpinalHead(2, 3)
    params = zero_variables(head, 7)["params"]
    assert [params[f"layer_{i}"]["kernel"].shape for i in (1, 2, 3, 4)] == [(3, 3), (7, 3), (6, 3), (7, 3)]


def test_spinal_dropout_is_drawn_afresh_before_every_layer_and_the_output():
    head, variables = spinal_showing(256, 3, dropout_rate=0.5)
    copy_features(variables, [1, 2, 3], 128)
    logits = apply(head, variables, np.ones((64, 256), np.float32), train=True, key=KEY)
    y_1, y_2, y_3 = (np.asarray(logits)[:, i * 128 : (i + 1) * 128] for i in range(3))
    for y in (y_1, y_2, y_3):
        np.testing.assert_allclose(np.unique(y), [0, 4])
        assert_fraction(y != 0, 1 / 4)
    for a, b in ((y_1, y_2), (y_1, y_3), (y_2, y_3)):
        assert_fraction((a != 0) & (b != 0), 1 / 16)


@pytest.mark.parametrize("name", ["spinal", "mlp", "dense"])
def test_baselines_drop_nothing_in_evaluation(name):
    head = HEADS[name](dropout_rate=0.9)
    variables = random_variables(head, 8, np.random.default_rng(0))
    features = draw(5, 8)
    expected = apply(head.clone(dropout_rate=0.0), variables, features, train=False)
    np.testing.assert_array_equal(apply(head, variables, features, train=False, key=KEY), expected)
    assert (apply(head, variables, features, train=True, key=KEY) != expected).any()


@pytest.mark.parametrize("norm", [None, "batch"])
def test_mlp_is_one_hidden_layer(norm):
    head = MLPHead(4, 6, norm=norm)
    variables = jax.tree.map(np.asarray, random_variables(head, 5, np.random.default_rng(0)))
    first, output = variables["params"]["layer_1"], variables["params"]["output"]
    features = draw(8, 5)
    pre = features @ first["kernel"] + first["bias"]
    if norm:
        pre = numpy_norm(pre, first["norm"], variables["batch_stats"]["layer_1"]["norm"], train=False)
    expected = np.maximum(pre, 0) @ output["kernel"] + output["bias"]
    np.testing.assert_allclose(apply(head, variables, features, train=False), expected, rtol=1e-4, atol=1e-5)


def test_mlp_drops_the_features_and_the_hidden_layer():
    head = MLPHead(128, 128, dropout_rate=0.5)
    variables = zero_variables(head, 128)
    for layer in variables["params"].values():
        layer["kernel"][:] = np.eye(128)
    logits = np.asarray(apply(head, variables, np.ones((64, 128), np.float32), train=True, key=KEY))
    np.testing.assert_allclose(np.unique(logits), [0, 4])
    assert_fraction(logits != 0, 1 / 4)


def test_dense_is_one_linear_layer_after_dropout():
    head = DenseHead(4)
    variables = jax.tree.map(np.asarray, random_variables(head, 5, np.random.default_rng(0)))
    features = draw(8, 5)
    expected = features @ variables["params"]["output"]["kernel"] + variables["params"]["output"]["bias"]
    np.testing.assert_allclose(apply(head, variables, features, train=True), expected, rtol=1e-5, atol=1e-6)

    head = DenseHead(128, dropout_rate=0.5)
    variables = {"params": {"output": {"kernel": np.eye(128, dtype=np.float32), "bias": np.zeros(128, np.float32)}}}
    logits = np.asarray(apply(head, variables, np.ones((64, 128), np.float32), train=True, key=KEY))
    np.testing.assert_allclose(np.unique(logits), [0, 2])
    assert_fraction(logits != 0, 1 / 2)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("num_parameters", [10, 95_498, 514_218, 2_166_949])
def test_matching_width_comes_closest_in_parameters(num_parameters, norm):
    width = matching_width(num_parameters, 784, 10, batch_norm=norm is not None)

    def miss(layer_width):
        params = zero_variables(MLPHead(10, layer_width, norm=norm), 784)["params"]
        return abs(sum(leaf.size for leaf in jax.tree.leaves(params)) - num_parameters)

    assert width >= 1
    assert all(miss(width) <= miss(other) for other in (width - 1, width + 1) if other >= 1)
