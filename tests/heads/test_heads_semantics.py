"""What a layer sees and what is dropped, each property by a test that the likely mistake would fail.

Most tests choose the kernels so that the logits, or the outputs of the layers within them, show what a layer saw.
"""

import flax
import jax
import numpy as np
import pytest
from heads_support import (
    COMPILE_FAST,
    KEY,
    apply,
    assert_fraction,
    copy_features,
    copy_previous,
    draw,
    every_implementation,
    features_mask,
    random_variables,
    showing_head,
    shown,
)

from pspinal_jax import ProgressiveSpinalHead

# The mask of u.


@every_implementation
def test_layer_1_sees_the_features_without_dropout(implementation):
    head, variables = showing_head(16, 1, dropout_rate=0.5, implementation=implementation)
    copy_features(variables, [1], 16)
    features = draw(8, 16)
    u, y_1 = shown(head, variables, features)
    assert (u == 0).any()
    np.testing.assert_allclose(y_1, features, rtol=1e-6)


@every_implementation
def test_gradient_reaches_the_features_undropped_through_layer_1_only(implementation):
    head, variables = showing_head(16, 2, dropout_rate=0.5, implementation=implementation)
    copy_features(variables, [1, 2], 16)

    def total(features, block):
        logits = head.apply(variables, features, train=True, rngs={"dropout": KEY})
        return logits.reshape(8, 3, 16)[:, block].sum()

    gradient = jax.jit(jax.grad(total), compiler_options=COMPILE_FAST)
    of_u, of_y_1, of_y_2 = (np.asarray(gradient(draw(8, 16), block)) for block in range(3))
    np.testing.assert_allclose(of_y_1, 1, rtol=1e-6)
    assert 0 < (of_u == 0).mean() < 1
    np.testing.assert_array_equal(of_y_2, of_u)


@every_implementation
def test_one_mask_is_shared_by_the_later_layers_and_the_output(implementation):
    head, variables = showing_head(16, 4, dropout_rate=0.5, implementation=implementation)
    copy_features(variables, [2, 3, 4], 16)
    u, _, *later = shown(head, variables, draw(8, 16))
    assert 0 < (u == 0).mean() < 1
    for y in later:
        np.testing.assert_array_equal(y, u)


@every_implementation
def test_outputs_of_layers_are_not_dropped_by_the_mask_of_u(implementation):
    head, variables = showing_head(16, 4, dropout_rate=0.5, implementation=implementation)
    copy_features(variables, [1], 16)
    copy_previous(variables, [2, 3, 4], 16)
    features = draw(8, 16)
    # y_4 went through the inputs of layers 2, 3, 4 and of the output.
    _, *outputs = shown(head, variables, features)
    for y in outputs:
        np.testing.assert_allclose(y, features, rtol=1e-6)


@every_implementation
@pytest.mark.parametrize("index", [2, 3, 4])
def test_a_layer_sees_every_earlier_layer(implementation, index):
    head, variables = showing_head(2, 4, dropout_rate=0.0, implementation=implementation)
    for i in range(1, 5):
        variables["params"][f"layer_{i}"]["bias"][:] = 10.0**i if i < index else 0
    kernel = variables["params"][f"layer_{index}"]["kernel"]
    for earlier in range(1, index):
        kernel[2 * earlier : 2 * earlier + 2] = earlier * np.eye(2)
    outputs = shown(head, variables, draw(3, 2))
    np.testing.assert_allclose(outputs[index], sum(earlier * 10.0**earlier for earlier in range(1, index)), rtol=1e-6)


# The masks of layer_dropout_rate.


@every_implementation
def test_layer_dropout_draws_a_fresh_mask_for_each_layer_and_the_output(implementation):
    head, variables = showing_head(128, 3, dropout_rate=0.0, layer_dropout_rate=0.5, implementation=implementation)
    copy_features(variables, [1, 2, 3], 128)
    u, *outputs = shown(head, variables, np.ones((64, 128), np.float32)) != 0
    assert_fraction(u, 1 / 2)
    for y in outputs:
        assert_fraction(y, 1 / 4)  # the layer's own mask, then the output's mask of that slot
        assert_fraction(u & y, 1 / 8)  # 1/4 if the output had the layer's mask
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert_fraction(outputs[i] & outputs[j], 1 / 16)  # 1/8 if the two layers had one mask


@every_implementation
def test_layer_dropout_comes_on_top_of_the_mask_of_u_except_for_layer_1(implementation):
    head, variables = showing_head(128, 3, dropout_rate=0.5, layer_dropout_rate=0.5, implementation=implementation)
    copy_features(variables, [1, 2, 3], 128)
    u, y_1, y_2, y_3 = shown(head, variables, np.ones((64, 128), np.float32))
    # Each mask doubles what it keeps, so a value counts the masks that it went through.
    for values, masks in ((u, 2), (y_1, 2), (y_2, 3), (y_3, 3)):
        np.testing.assert_allclose(np.unique(values), [0, 2**masks])
        assert_fraction(values != 0, 2.0**-masks)
    assert_fraction((y_2 != 0) & (y_3 != 0), 1 / 32)  # u's mask in common, one each of the layers' and the output's


@every_implementation
def test_layer_dropout_drops_the_outputs_of_layers_too(implementation):
    head, variables = showing_head(128, 3, dropout_rate=0.0, layer_dropout_rate=0.5, implementation=implementation)
    variables["params"]["layer_1"]["bias"][:] = 1
    copy_previous(variables, [2, 3], 128)
    _, *outputs = shown(head, variables, np.ones((64, 128), np.float32))
    for masks, y in enumerate(outputs, 1):
        np.testing.assert_allclose(np.unique(y), [0, 2**masks])
        assert_fraction(y != 0, 2.0**-masks)


@every_implementation
def test_dropout_comes_before_the_linear_map(implementation):
    head, variables = showing_head(16, 3, dropout_rate=0.5, layer_dropout_rate=0.5, implementation=implementation)
    for i in (1, 2, 3):
        variables["params"][f"layer_{i}"]["bias"][:] = 1
    variables["params"]["output"]["bias"][:] = 100
    _, *outputs = shown(head, variables, draw(32, 16))
    for y in outputs:  # dropped once, by the output, and by no layer after its bias
        np.testing.assert_allclose(np.unique(y), [100, 102])


# Dropout itself.


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.35, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_keeps_the_expectation(rate):
    mask = features_mask(511, 64, rate, seed=1)
    assert_fraction(mask == 0, rate)
    np.testing.assert_allclose(mask[mask != 0], 1 / (1 - rate), rtol=1e-3)
    assert abs(mask.mean() - 1) < 5 * (rate / (1 - rate) / mask.size) ** 0.5


def test_dropout_is_independent_between_rows_columns_and_neighbours():
    dropped = features_mask(256, 128, 0.5, seed=2) == 0
    assert_fraction(dropped[1:] & dropped[:-1], 1 / 4)
    assert_fraction(dropped[:, 1:] & dropped[:, :-1], 1 / 4)
    # Random numbers are cut in two halves, each of which makes a column of its own.
    assert_fraction(dropped[:, ::2] & dropped[:, 1::2], 1 / 4)
    assert_fraction(dropped[:, :128] & dropped[:, 128:], 1 / 4)


@every_implementation
def test_masks_are_a_function_of_the_key(implementation):
    head = ProgressiveSpinalHead(5, 8, num_layers=2, layer_dropout_rate=0.5, implementation=implementation)
    variables = random_variables(head, 32, np.random.default_rng(0))
    features = draw(16, 32)

    def logits(key):
        return np.asarray(apply(head, variables, features, train=True, key=key))

    np.testing.assert_array_equal(logits(jax.random.key(3)), logits(jax.random.key(3)))
    assert (logits(jax.random.key(3)) != logits(jax.random.key(4))).all()
    # Raw uint32 keys, jax's old kind, are the same keys.
    np.testing.assert_array_equal(logits(jax.random.key(3)), logits(jax.random.PRNGKey(3)))


@every_implementation
@pytest.mark.parametrize("norm", [None, "batch"])
def test_evaluation_drops_nothing_and_needs_no_key(implementation, norm):
    rates = {"dropout_rate": 0.9, "layer_dropout_rate": 0.9}
    head = ProgressiveSpinalHead(5, 8, norm=norm, implementation=implementation, **rates)
    variables = random_variables(head, 16, np.random.default_rng(0))
    features = draw(8, 16)
    expected = apply(head.clone(dropout_rate=0.0, layer_dropout_rate=0.0), variables, features, train=False)
    np.testing.assert_array_equal(apply(head, variables, features, train=False), expected)
    np.testing.assert_array_equal(apply(head, variables, features, train=False, key=KEY), expected)


@every_implementation
def test_training_without_rates_needs_no_key(implementation):
    head = ProgressiveSpinalHead(5, 8, dropout_rate=0.0, implementation=implementation)
    variables = random_variables(head, 16, np.random.default_rng(0))
    features = draw(8, 16)
    expected = apply(head, variables, features, train=False)
    np.testing.assert_allclose(apply(head, variables, features, train=True), expected, rtol=1e-6)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        apply(head.clone(dropout_rate=0.1), variables, features, train=True)
