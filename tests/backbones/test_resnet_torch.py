"""The ResNets against PyTorch modules of the same structure: every block, both modes, gradients and statistics."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import numpy as jnp

torch = pytest.importorskip("torch")
from torch_resnet import TorchResNet, arrays_of, randomised, traced  # noqa: E402

from pspinal_jax.backbones import ResNet, num_features  # noqa: E402
from pspinal_jax.layers.pooling import max_pool_3x3  # noqa: E402
from pspinal_jax.weights import resnet_variables  # noqa: E402

pytestmark = pytest.mark.torch

BLOCKS = {("stem",), *((f"block_{number}",) for number in range(1, 7))}
PEERS = {"resnet18": (18, 1), "resnet50": (50, 1), "wide_resnet50_2": (50, 2)}


def images_of(count, height, width, dtype=np.float32):
    return np.random.default_rng(3).normal(size=(count, height, width, 3)).astype(dtype)


def in_torch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def assert_close(ours, theirs, what, tolerance):
    """Largest difference relative to the largest entry: elementwise relative error means nothing near zero."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < tolerance, f"{what}: {error:.2e}"


def blocks_of(variant, variables, images, train):
    """Features, what leaves the stem and every block by the names of the torch module's trace, and new statistics."""

    def wanted(module, method):
        return method == "__call__" and module.path[-1:] in BLOCKS

    def apply(variables, images):
        return ResNet(variant).apply(
            variables, images, train=train, capture_intermediates=wanted, mutable=["intermediates", "batch_stats"]
        )

    features, state = jax.jit(apply)(variables, images)
    flat = flatten_dict(state["intermediates"], sep="/")
    return features, {name.removesuffix("/__call__"): value[0] for name, value in flat.items()}, state


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("variant", "size"), [("resnet18", (65, 65)), ("resnet18", (64, 97)), ("wide_resnet50_2", (65, 65))]
)
def test_every_block_agrees_with_torch(variant, size, train):
    model = randomised(TorchResNet(*PEERS[variant])).train(train)
    variables = resnet_variables(arrays_of(model), variant)
    images = images_of(4, *size)
    with torch.no_grad():
        expected, trace = traced(model, in_torch(images))
    features, blocks, state = blocks_of(variant, variables, images, train)
    assert blocks.keys() == trace.keys()
    for name, value in trace.items():
        assert_close(blocks[name], value, name, 1e-4)
    assert features.shape == (4, num_features(variant))
    assert_close(features, expected, "features", 1e-4)
    new = flatten_dict(resnet_variables(arrays_of(model), variant)["batch_stats"], sep="/")
    ours = flatten_dict(state["batch_stats"], sep="/") if "batch_stats" in state else new
    for name, value in new.items():
        assert_close(ours[name], value, name, 1e-4)
    old = flatten_dict(variables["batch_stats"], sep="/")
    assert all(np.array_equal(old[name], value) != train for name, value in new.items())


@pytest.mark.parametrize(("variant", "train"), [("resnet18", False), ("resnet18", True), ("resnet50", True)])
def test_gradients_agree_with_torch(variant, train):
    """In float64: a float32 pre-activation near 0, or two near-equal ones in a pool, may fall on either side."""
    model = randomised(TorchResNet(*PEERS[variant]), seed=1).double().train(train)
    images = images_of(3, 40, 65, np.float64)
    weights = np.random.default_rng(4).normal(size=(3, num_features(variant)))
    inputs = in_torch(images).requires_grad_()
    with jax.enable_x64(True):
        variables = resnet_variables(arrays_of(model), variant)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float64)}

        def loss(params, x):
            features, _ = ResNet(variant, param_dtype=jnp.float64).apply(
                {**variables, "params": params}, x, train=train, mutable=["batch_stats"]
            )
            return (features * weights).sum()

        ours, ours_x = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], images)
        ours, ours_x = jax.tree.map(np.asarray, (ours, ours_x))
    (model(inputs) * torch.from_numpy(weights)).sum().backward()
    assert_close(ours_x, inputs.grad.permute(0, 2, 3, 1), "images", 1e-9)
    gradients = {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}
    buffers = {name: tensor.numpy() for name, tensor in model.named_buffers()}
    theirs = flatten_dict(resnet_variables({**gradients, **buffers}, variant)["params"], sep="/")
    for name, value in flatten_dict(ours, sep="/").items():
        assert_close(value, theirs[name], name, 1e-9)


def test_overlapping_pooling_sends_gradients_where_torch_does_in_ties():
    rng = np.random.default_rng(5)
    inputs = rng.integers(-1, 2, size=(3, 8, 9, 4)).astype(np.float32)  # three values: ties in most windows
    weights = rng.integers(-9, 9, size=(3, 4, 5, 4)).astype(np.float32)  # integers add up in any order
    ours = jax.jit(jax.grad(lambda x: (max_pool_3x3(x) * weights).sum()))(jnp.asarray(inputs))
    x = in_torch(inputs).requires_grad_()
    (torch.nn.functional.max_pool2d(x, 3, 2, padding=1) * in_torch(weights)).sum().backward()
    np.testing.assert_array_equal(ours, x.grad.permute(0, 2, 3, 1).numpy())
