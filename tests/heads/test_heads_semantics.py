"""What the heads compute, each property by a test that the likely mistake would fail.

Most tests choose the kernels so that the logits, or the outputs of the layers within them, show what a layer saw.
"""

import inspect

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads_support import (
    COMPILE_FAST,
    IMPLEMENTATIONS,
    abstract_variables,
    apply,
    features_mask,
    identity,
    initialise,
    layer_masks,
    random_variables,
    zero_variables,
)

from pspinal_jax import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.heads.mlp import matching_width

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
KEY = jax.random.key(0)


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def showing_head(num_features, num_layers, **attributes):
    """A head of W = D whose logits are [u, y_1 .. y_L] as the output sees them, and its zero layer kernels."""
    total = (num_layers + 1) * num_features
    head = ProgressiveSpinalHead(total, num_features, num_layers, activation=identity, **attributes)
    variables = zero_variables(head, num_features)
    variables["params"]["output"]["kernel"][:] = np.eye(total)
    return head, variables


def shown(head, variables, features, seed=0, train=True):
    """[L + 1, N, D]: u, y_1 .. y_L of a `showing_head`."""
    logits = apply(head, variables, features, train=train, key=jax.random.key(seed))
    return np.asarray(logits).reshape(len(features), -1, features.shape[1]).swapaxes(0, 1)


def copy_features(variables, layers, num_features):
    for i in layers:
        variables["params"][f"layer_{i}"]["kernel"][:num_features] = np.eye(num_features)


def copy_previous(variables, layers, num_features):
    for i in layers:
        start = (i - 1) * num_features
        variables["params"][f"layer_{i}"]["kernel"][start:] = np.eye(num_features)


def assert_fraction(values, expected):
    """The share of true entries is `expected` within five standard deviations."""
    deviation = (expected * (1 - expected) / values.size) ** 0.5
    assert abs(values.mean() - expected) < 5 * deviation, (values.mean(), expected)


# The mask of u.


@both
def test_layer_1_sees_the_features_without_dropout(implementation):
    head, variables = showing_head(16, 1, dropout_rate=0.5, implementation=implementation)
    copy_features(variables, [1], 16)
    features = draw(8, 16)
    u, y_1 = shown(head, variables, features)
    assert (u == 0).any()
    np.testing.assert_allclose(y_1, features, rtol=1e-6)


@both
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


@both
def test_one_mask_is_shared_by_the_later_layers_and_the_output(implementation):
    head, variables = showing_head(16, 4, dropout_rate=0.5, implementation=implementation)
    copy_features(variables, [2, 3, 4], 16)
    u, _, *later = shown(head, variables, draw(8, 16))
    assert 0 < (u == 0).mean() < 1
    for y in later:
        np.testing.assert_array_equal(y, u)


@both
def test_outputs_of_layers_are_not_dropped_by_the_mask_of_u(implementation):
    head, variables = showing_head(16, 4, dropout_rate=0.5, implementation=implementation)
    copy_features(variables, [1], 16)
    copy_previous(variables, [2, 3, 4], 16)
    features = draw(8, 16)
    # y_4 went through the inputs of layers 2, 3, 4 and of the output.
    _, *outputs = shown(head, variables, features)
    for y in outputs:
        np.testing.assert_allclose(y, features, rtol=1e-6)


@both
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


@both
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


@both
def test_layer_dropout_comes_on_top_of_the_mask_of_u_except_for_layer_1(implementation):
    head, variables = showing_head(128, 3, dropout_rate=0.5, layer_dropout_rate=0.5, implementation=implementation)
    copy_features(variables, [1, 2, 3], 128)
    u, y_1, y_2, y_3 = shown(head, variables, np.ones((64, 128), np.float32))
    # Each mask doubles what it keeps, so a value counts the masks that it went through.
    for values, masks in ((u, 2), (y_1, 2), (y_2, 3), (y_3, 3)):
        np.testing.assert_allclose(np.unique(values), [0, 2**masks])
        assert_fraction(values != 0, 2.0**-masks)
    assert_fraction((y_2 != 0) & (y_3 != 0), 1 / 32)  # u's mask in common, one each of the layers' and the output's


@both
def test_layer_dropout_drops_the_outputs_of_layers_too(implementation):
    head, variables = showing_head(128, 3, dropout_rate=0.0, layer_dropout_rate=0.5, implementation=implementation)
    variables["params"]["layer_1"]["bias"][:] = 1
    copy_previous(variables, [2, 3], 128)
    _, *outputs = shown(head, variables, np.ones((64, 128), np.float32))
    for masks, y in enumerate(outputs, 1):
        np.testing.assert_allclose(np.unique(y), [0, 2**masks])
        assert_fraction(y != 0, 2.0**-masks)


@both
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


@both
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


@both
@pytest.mark.parametrize("norm", [None, "batch"])
def test_evaluation_drops_nothing_and_needs_no_key(implementation, norm):
    rates = {"dropout_rate": 0.9, "layer_dropout_rate": 0.9}
    head = ProgressiveSpinalHead(5, 8, norm=norm, implementation=implementation, **rates)
    variables = random_variables(head, 16, np.random.default_rng(0))
    features = draw(8, 16)
    expected = apply(head.clone(dropout_rate=0.0, layer_dropout_rate=0.0), variables, features, train=False)
    np.testing.assert_array_equal(apply(head, variables, features, train=False), expected)
    np.testing.assert_array_equal(apply(head, variables, features, train=False, key=KEY), expected)


@both
def test_training_without_rates_needs_no_key(implementation):
    head = ProgressiveSpinalHead(5, 8, dropout_rate=0.0, implementation=implementation)
    variables = random_variables(head, 16, np.random.default_rng(0))
    features = draw(8, 16)
    expected = apply(head, variables, features, train=False)
    np.testing.assert_allclose(apply(head, variables, features, train=True), expected, rtol=1e-6)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        apply(head.clone(dropout_rate=0.1), variables, features, train=True)


# Batch norm, alike in every head that has it.


def normed_head(kind, **attributes):
    """A head of one hidden layer, D = W = 3, C = 3, whose logits are act(norm(x)); `implementation` is its kind."""
    if kind in IMPLEMENTATIONS:
        head = ProgressiveSpinalHead(3, 3, num_layers=1, norm="batch", implementation=kind, **attributes)
    elif kind == "spinal":
        head = SpinalHead(3, 3, num_layers=1, norm="batch", **attributes)
    else:
        head = MLPHead(3, 3, norm="batch", **attributes)
    num_features = 6 if kind == "spinal" else 3
    variables = zero_variables(head, num_features)
    variables["params"]["layer_1"]["kernel"][:] = np.eye(3)
    variables["params"]["output"]["kernel"][-3:] = np.eye(3)
    return head, variables, (lambda pre: np.tile(pre, 2)) if kind == "spinal" else np.asarray


with_norm = pytest.mark.parametrize("kind", [*IMPLEMENTATIONS, "spinal", "mlp"])


@with_norm
def test_running_variance_is_unbiased_and_the_batch_is_normalised_by_the_biased_one(kind):
    head, variables, as_features = normed_head(kind, dropout_rate=0.0, activation=identity)
    pre = draw(4, 3) * 3 + 1
    norm = variables["params"]["layer_1"]["norm"]
    norm["scale"][:], norm["bias"][:] = [1, 2, 3], [4, 5, 6]
    running = variables["batch_stats"]["layer_1"]["norm"]
    running["mean"][:], running["var"][:] = [1, 2, 3], [5, 6, 7]
    logits, new = apply(head, variables, as_features(pre), train=True, mutable="batch_stats")

    normalised = (pre - pre.mean(0)) / np.sqrt(pre.var(0, ddof=0) + 1e-5)
    np.testing.assert_allclose(logits, normalised * norm["scale"] + norm["bias"], rtol=1e-5, atol=1e-5)
    new = new["batch_stats"]["layer_1"]["norm"]
    np.testing.assert_allclose(new["mean"], 0.9 * running["mean"] + 0.1 * pre.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * running["var"] + 0.1 * pre.var(0, ddof=1), rtol=1e-5)


@with_norm
def test_evaluation_uses_the_running_statistics_and_keeps_them(kind):
    head, variables, as_features = normed_head(kind, dropout_rate=0.0, activation=identity)
    pre = draw(4, 3) * 3 + 1
    running = variables["batch_stats"]["layer_1"]["norm"]
    running["mean"][:], running["var"][:] = [1, 2, 3], [0, 6, 7]
    logits, new = apply(head, variables, as_features(pre), train=False, mutable="batch_stats")
    expected = (pre - running["mean"]) / np.sqrt(running["var"] + 1e-5)  # the variance of 0 shows epsilon
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)
    for name, values in running.items():
        np.testing.assert_array_equal(new["batch_stats"]["layer_1"]["norm"][name], values)


@with_norm
def test_norm_comes_after_the_linear_map_and_before_the_activation(kind):
    head, variables, as_features = normed_head(kind, dropout_rate=0.0)
    pre = -1 - draw(8, 3) ** 2  # ReLU first would leave nothing but zeros to normalise
    variables["params"]["layer_1"]["bias"][:] = 0.5
    logits, new = apply(head, variables, as_features(pre), train=True, mutable="batch_stats")
    expected = np.maximum((pre - pre.mean(0)) / np.sqrt(pre.var(0) + 1e-5), 0)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    mean = new["batch_stats"]["layer_1"]["norm"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * (pre.mean(0) + 0.5), rtol=1e-5)


@with_norm
def test_statistics_stay_where_they_are_not_mutable(kind):
    head, variables, as_features = normed_head(kind, dropout_rate=0.0)
    before = jax.tree.map(np.copy, variables)
    with_update, _ = apply(head, variables, as_features(draw(4, 3)), train=True, mutable="batch_stats")
    assert with_update.shape == (4, 3)
    assert apply(head, variables, as_features(draw(4, 3)), train=True).shape == (4, 3)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@with_norm
def test_initialisation_leaves_statistics_at_zero_and_one(kind):
    head, _, as_features = normed_head(kind)
    variables = initialise(head, as_features(draw(4, 3) + 5), train=True)
    running = variables["batch_stats"]["layer_1"]["norm"]
    np.testing.assert_array_equal(running["mean"], 0)
    np.testing.assert_array_equal(running["var"], 1)
    norm = variables["params"]["layer_1"]["norm"]
    np.testing.assert_array_equal(norm["scale"], 1)
    np.testing.assert_array_equal(norm["bias"], 0)


# The whole equation, written once more in NumPy.


def numpy_norm(pre, layer, running, train):
    mean, var = (pre.mean(0), pre.var(0)) if train else (running["mean"], running["var"])
    return (pre - mean) / np.sqrt(var + 1e-5) * layer["scale"] + layer["bias"]


def numpy_head(variables, features, num_layers, train, features_mask=1.0, masks=None):
    u, outputs = features * features_mask, []
    for i in range(1, num_layers + 2):
        layer = variables["params"]["output" if i > num_layers else f"layer_{i}"]
        inputs = features if i == 1 else np.concatenate([u, *outputs], 1)
        pre = (inputs if masks is None else inputs * masks[i - 1]) @ layer["kernel"] + layer["bias"]
        if i > num_layers:
            return pre
        if "norm" in layer:
            pre = numpy_norm(pre, layer["norm"], variables["batch_stats"][f"layer_{i}"]["norm"], train)
        outputs.append(np.maximum(pre, 0))


@both
@pytest.mark.parametrize(
    ("norm", "layer_dropout_rate", "train"),
    [(None, 0.0, True), (None, 0.4, True), ("batch", 0.4, True), ("batch", 0.4, False)],
)
def test_logits_are_those_of_the_equation(implementation, norm, layer_dropout_rate, train):
    head = ProgressiveSpinalHead(
        4, 3, 3, layer_dropout_rate=layer_dropout_rate, norm=norm, implementation=implementation
    )
    variables = jax.tree.map(np.asarray, random_variables(head, 7, np.random.default_rng(0)))
    features, seed = draw(8, 7), 5
    drawn = {}
    if train:
        drawn["features_mask"] = features_mask(7, 8, 0.2, seed)
        drawn["masks"] = layer_masks(7, 3, 3, 8, layer_dropout_rate, seed) if layer_dropout_rate else None
    logits = apply(head, variables, features, train=train, key=jax.random.key(seed))
    np.testing.assert_allclose(logits, numpy_head(variables, features, 3, train, **drawn), rtol=1e-5, atol=1e-5)


# Shapes, dtypes, initial values, defaults.


@both
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


HEADS = {
    "unrolled": lambda **kw: ProgressiveSpinalHead(num_classes=4, layer_width=6, **kw),
    "scan": lambda **kw: ProgressiveSpinalHead(num_classes=4, layer_width=6, implementation="scan", **kw),
    "spinal": lambda **kw: SpinalHead(num_classes=4, layer_width=6, **kw),
    "mlp": lambda **kw: MLPHead(num_classes=4, layer_width=6, **kw),
    "dense": lambda **kw: DenseHead(num_classes=4, **kw),
}
every_head = pytest.mark.parametrize("name", HEADS)


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
    assert head.activation is nn.relu
    assert head.dtype is None and head.param_dtype is jnp.float32
    for missing in ({"num_classes": 10}, {"layer_width": 64}):
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            ProgressiveSpinalHead(**missing)


@both
def test_default_activation_is_relu_and_another_can_be_chosen(implementation):
    features = draw(8, 4)
    for activation, expected in (({}, np.maximum(features, 0)), ({"activation": jnp.tanh}, np.tanh(features))):
        head = ProgressiveSpinalHead(4, 4, num_layers=1, implementation=implementation, **activation)
        variables = zero_variables(head, 4)
        variables["params"]["layer_1"]["kernel"][:] = np.eye(4)
        variables["params"]["output"]["kernel"][4:] = np.eye(4)
        np.testing.assert_allclose(apply(head, variables, features, train=False), expected, rtol=1e-6)


# The baselines.


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
