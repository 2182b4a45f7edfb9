"""Parity with PyTorch: the same equation in torch.nn, the same numbers in, the same numbers out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads_support import (
    COMPILE_FAST,
    IMPLEMENTATIONS,
    assert_tree_close,
    features_mask,
    initialise,
    layer_masks,
    random_variables,
)

from pspinal_jax import ProgressiveSpinalHead

torch = pytest.importorskip("torch")
from torch_head import results  # noqa: E402  (it imports torch)

pytestmark = pytest.mark.torch

FEATURES, WIDTH, LAYERS, CLASSES, ROWS = 7, 4, 3, 5, 12


def our_results(head, variables, features, weights, train, seed):
    stats = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params, features):
        rngs = {"dropout": jax.random.key(seed)}
        logits, new = head.apply({"params": params, **stats}, features, train=train, rngs=rngs, mutable=["batch_stats"])
        return (logits * weights).sum(), (logits, new)

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=COMPILE_FAST)
    (grads, grad_features), (logits, new) = gradient(variables["params"], features)
    return {
        "logits": logits,
        "params_gradient": grads,
        "features_gradient": grad_features,
        "batch_stats": new.get("batch_stats", {}),
    }


def check(implementation, norm, dropout_rate, layer_dropout_rate, train, dtype, tolerance, seed=3):
    head = ProgressiveSpinalHead(
        CLASSES, WIDTH, LAYERS, dropout_rate, layer_dropout_rate, norm, implementation=implementation, param_dtype=dtype
    )
    rng = np.random.default_rng(seed)
    variables = random_variables(head, FEATURES, rng, dtype)
    features = rng.standard_normal((ROWS, FEATURES)).astype(dtype)
    weights = rng.standard_normal((ROWS, CLASSES)).astype(dtype)
    masks = [None, None]
    if train and dropout_rate:
        masks[0] = torch.tensor(features_mask(FEATURES, ROWS, dropout_rate, seed).astype(dtype))
    if train and layer_dropout_rate:
        drawn = layer_masks(FEATURES, WIDTH, LAYERS, ROWS, layer_dropout_rate, seed)
        masks[1] = [torch.tensor(mask.astype(dtype)) for mask in drawn]
    expected = results(head, variables, features, weights, train, masks)
    actual = our_results(head, variables, features, weights, train, seed)
    assert bool(norm) == bool(expected["batch_stats"])
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected["params_gradient"]))

    def floor(path):
        # Batch norm takes a constant out again, so the gradient of the bias before it is rounding and no more.
        part, *path = [entry.key for entry in path]
        of_bias = part == "params_gradient" and path[0] != "output" and path[1:] == ["bias"]
        return largest if norm and train and of_bias else 0.0

    assert_tree_close(actual, expected, tolerance, floor)


every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
settings = pytest.mark.parametrize(
    ("norm", "dropout_rate", "layer_dropout_rate", "train"),
    [
        (None, 0.0, 0.0, True),
        (None, 0.2, 0.0, True),
        (None, 0.2, 0.5, True),
        ("batch", 0.0, 0.0, True),
        ("batch", 0.2, 0.0, True),
        ("batch", 0.2, 0.5, True),
        (None, 0.2, 0.5, False),
        ("batch", 0.2, 0.5, False),
    ],
)


@every_implementation
@settings
def test_parity_with_torch_in_float32(implementation, norm, dropout_rate, layer_dropout_rate, train):
    with jax.default_matmul_precision("highest"):
        check(implementation, norm, dropout_rate, layer_dropout_rate, train, np.float32, 1e-5)


@every_implementation
@pytest.mark.parametrize("train", [True, False])
def test_parity_with_torch_in_float64(implementation, train):
    with jax.enable_x64(True):
        check(implementation, "batch", 0.0, 0.0, train, np.float64, 1e-12)


def test_initial_values_fill_the_same_range_as_torchs():
    # Many values, so that the largest of them is close to the bound.
    torch.manual_seed(0)
    linear = torch.nn.Linear(50, 2000)
    params = initialise(ProgressiveSpinalHead(2000, 2000, num_layers=1), jnp.ones((1, 50)))["params"]
    bound = 50**-0.5
    theirs = {"kernel": linear.weight.detach().numpy(), "bias": linear.bias.detach().numpy()}
    for name, values in theirs.items():
        for drawn in (values, np.asarray(params["layer_1"][name])):
            assert 0.98 * bound < np.abs(drawn).max() <= bound
        # A uniform draw is known by its spread, too: bound / sqrt(3).
        assert abs(values.std() / np.asarray(params["layer_1"][name]).std() - 1) < 5 / values.size**0.5
