"""Batch norm, and the whole equation written once more in NumPy."""

import jax
import numpy as np
import pytest
from heads_support import (
    IMPLEMENTATIONS,
    apply,
    draw,
    every_implementation,
    features_mask,
    identity,
    initialise,
    layer_masks,
    numpy_norm,
    random_variables,
    zero_variables,
)

from pspinal_jax import MLPHead, ProgressiveSpinalHead, SpinalHead


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


@every_implementation
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
