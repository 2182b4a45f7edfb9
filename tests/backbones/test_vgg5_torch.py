"""VGG-5 against a PyTorch module of the same structure: every layer, both modes, gradients and running statistics."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import numpy as jnp

torch = pytest.importorskip("torch")
from torch_vgg5 import gradients_of, randomised, traced, variables_of  # noqa: E402

from pspinal_jax.backbones import VGG5  # noqa: E402
from pspinal_jax.layers.pooling import max_pool_2x2  # noqa: E402

pytestmark = pytest.mark.torch

BATCH = 16


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).normal(size=(BATCH, 28, 28, 1)).astype(np.float32)


def assert_close(ours, theirs, what, tolerance):
    """Largest difference relative to the largest entry: elementwise relative error means nothing near zero."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < tolerance, f"{what}: {error:.2e}"


def layers_of(variables, images, train):
    """What leaves each of our layers and stages, by the names of the torch module's trace, and the features."""

    def wanted(module, method):  # the layers and stages; not the norm's variables, which are no arrays
        return method == "__call__" and len(module.path) in (1, 2)

    def apply(variables, images):
        return VGG5().apply(
            variables, images, train=train, capture_intermediates=wanted, mutable=["intermediates", "batch_stats"]
        )

    features, state = jax.jit(apply)(variables, images)
    flat = flatten_dict(state["intermediates"], sep="/")
    return features, {name.removesuffix("/__call__"): value[0] for name, value in flat.items()}, state


@pytest.mark.parametrize("train", [False, True])
def test_every_layer_agrees_with_torch(images, train):
    model = randomised(0).train(train)
    variables = variables_of(model)
    with torch.no_grad():
        expected, trace = traced(model, torch.from_numpy(images).permute(0, 3, 1, 2))
    features, layers, state = layers_of(variables, images, train)
    for name, value in trace.items():
        assert_close(layers[name], value, name, 2e-5)
    assert_close(features, expected, "features", 2e-5)
    new = flatten_dict(variables_of(model)["batch_stats"], sep="/")
    ours = flatten_dict(state["batch_stats"], sep="/") if "batch_stats" in state else new
    for name, value in new.items():
        assert_close(ours[name], value, name, 1e-5)
    old = flatten_dict(variables["batch_stats"], sep="/")
    assert all(np.array_equal(old[name], value) != train for name, value in new.items())


@pytest.mark.parametrize("train", [False, True])
def test_gradients_agree_with_torch(images, train):
    """In float64: a float32 pre-activation near 0, or two near-equal ones in a pool, may fall on either side."""
    model = randomised(1).double().train(train)
    weights = np.random.default_rng(4).normal(size=(BATCH, 256))
    inputs = torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2).contiguous().requires_grad_()
    with jax.enable_x64(True):
        variables = variables_of(model)

        def loss(params, x):
            stats = variables["batch_stats"]
            model = VGG5(param_dtype=jnp.float64)
            features, _ = model.apply({"params": params, "batch_stats": stats}, x, train=train, mutable=["batch_stats"])
            return (features * weights).sum()

        ours, ours_x = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], images.astype(np.float64))
        ours, ours_x = jax.tree.map(np.asarray, (ours, ours_x))
    (model(inputs) * torch.from_numpy(weights)).sum().backward()
    assert_close(ours_x, inputs.grad.permute(0, 2, 3, 1), "images", 1e-9)
    theirs = flatten_dict(gradients_of(model), sep="/")
    for name, value in flatten_dict(ours, sep="/").items():
        if train and "norm" not in name and name.endswith("/bias"):
            # Exactly zero in exact arithmetic: ours is 0, torch's is rounding noise.
            assert np.abs(value).max() == 0 and np.abs(theirs[name]).max() < 1e-9
        else:
            assert_close(value, theirs[name], name, 1e-9)


def test_pooling_gradient_goes_where_torch_sends_it_in_ties():
    rng = np.random.default_rng(5)
    inputs = rng.integers(-1, 2, size=(3, 7, 9, 4)).astype(np.float32)  # three values: ties in most windows
    weights = rng.normal(size=(3, 3, 4, 4)).astype(np.float32)
    ours = jax.grad(lambda x: (max_pool_2x2(x) * weights).sum())(jnp.asarray(inputs))
    x = torch.from_numpy(inputs).permute(0, 3, 1, 2).contiguous().requires_grad_()
    (torch.nn.functional.max_pool2d(x, 2, 2) * torch.from_numpy(weights).permute(0, 3, 1, 2)).sum().backward()
    np.testing.assert_array_equal(ours, x.grad.permute(0, 2, 3, 1).numpy())
