"""EfficientNet-Lite: its parameters and shapes, the depthwise convolution on every platform, and PyTorch's twin."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspinal_jax.backbones import EfficientNetLite, efficientnet
from pspinal_jax.backbones.efficientnet import BlockConfig, ConvNorm, InvertedBottleneck
from pspinal_jax.environment import jit_with
from pspinal_jax.layers import conv, depthwise


def images(batch=2, side=64):
    return np.random.default_rng(0).standard_normal((batch, side, side, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    model = EfficientNetLite("efficientnet_lite0")
    return jax.jit(partial(model.init, train=False))(jax.random.key(0), images())


@pytest.mark.parametrize(("variant", "parameters"), [("lite0", 3_371_008), ("lite1", 4_135_680), ("lite2", 4_811_072)])
def test_parameters_are_counted_as_published(variant, parameters):
    """4.65, 5.42 and 6.09 million in the paper's repository, with a classifier of 1,281,000."""
    model = EfficientNetLite(f"efficientnet_{variant}")
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == parameters


@pytest.mark.parametrize(
    ("side", "kernel", "stride"),
    [(7, 3, 2), (2, 5, 1), *(pytest.param(8, *rest, marks=pytest.mark.slow) for rest in ((3, 1), (5, 2)))],
)
def test_shifted_sums_are_the_convolution_and_so_are_their_gradients(side, kernel, stride, monkeypatch):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, side, side + 1, 4)), rng.standard_normal((kernel, kernel, 1, 4))
    with jax.enable_x64(True):
        x, w = jnp.asarray(x), jnp.asarray(w)
        both = []
        for function in (depthwise._grouped, depthwise._shifts):
            outputs, pullback = jax.vjp(partial(function, stride), x, w)
            both.append((outputs, *pullback(jnp.cos(outputs))))
        for by_library in (False, True):
            monkeypatch.setattr(depthwise, "library_convolves", lambda by_library=by_library: by_library)
            public, pullback = jax.vjp(partial(depthwise.depthwise_conv, stride=stride), x, w)
            both.append((public, *pullback(jnp.cos(public))))
        for other in both[1:]:
            for ours, theirs in zip(both[0], other, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_on_cpu_no_grouped_convolution_is_left_and_elsewhere_it_is():
    x, w = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))
    for platform, count in (("cpu", 0), ("cuda", 1), ("tpu", 1)):
        exported = jax.export.export(jax.jit(depthwise.depthwise_conv), platforms=[platform])(x, w)
        assert exported.mlir_module().count("stablehlo.convolution") == count, platform


@pytest.mark.parametrize(("dtype", "count"), [(jnp.float32, 1), (jnp.bfloat16, 0)])
def test_where_onednn_convolves_the_convolution_is_left_to_it(dtype, count):
    """In bfloat16 it would not take it, and a loop nest is 10 to 200 times as slow."""
    x, w = jnp.ones((1, 8, 8, 4), dtype), jnp.ones((3, 3, 1, 4), dtype)
    text = jit_with({"xla_cpu_enable_fast_min_max": False}, depthwise.depthwise_conv).lower(x, w).as_text()
    assert text.count("stablehlo.convolution") == count
    assert jax.jit(depthwise.depthwise_conv).lower(x, w).as_text().count("stablehlo.convolution") == 0


@pytest.mark.parametrize("by_library", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_in_bfloat16_it_is_rounded_once(stride, by_library, monkeypatch):
    monkeypatch.setattr(depthwise, "library_convolves", lambda: by_library)
    rng = np.random.default_rng(3)
    x, w = (rng.uniform(0.5, 1, shape) for shape in ((8, 12, 12, 4), (5, 5, 1, 4)))
    results = []
    with jax.enable_x64(True):
        x, w = (jnp.asarray(values).astype(jnp.bfloat16) for values in (x, w))
        for dtype in (jnp.bfloat16, jnp.float64):
            public = partial(depthwise.depthwise_conv, stride=stride)
            outputs, pullback = jax.vjp(public, x.astype(dtype), w.astype(dtype))
            results.append((outputs, *pullback(jnp.ones_like(outputs))))
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8)


@pytest.mark.parametrize(("channels", "kernel", "relu"), [(5, 1, False), (5, 3, True), (None, 5, True)])
def test_evaluation_is_the_same_with_the_norm_in_the_kernel(channels, kernel, relu, monkeypatch):
    layer = ConvNorm(channels, kernel, relu=relu, param_dtype=jnp.float64)
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        x = jnp.asarray(rng.normal(size=(2, 9, 8, 4)))
        shapes = jax.eval_shape(partial(layer.init, train=False), jax.random.key(0), x)
        variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 3, leaf.shape)), shapes)
        plain = layer.apply(variables, x, False)
        for module in (efficientnet, conv, depthwise):
            monkeypatch.setattr(module, "library_convolves", lambda: True)
        np.testing.assert_allclose(layer.apply(variables, x, False), plain, rtol=1e-12, atol=1e-12)
        for dtype in (jnp.bfloat16, jnp.float32):
            assert layer.apply(variables, x.astype(dtype), False).dtype == dtype


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"got \(3, 3, 4, 4\)"):
        depthwise.depthwise_conv(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4)))
    with pytest.raises(ValueError, match="variant must be one of"):
        EfficientNetLite("efficientnet_lite9")
    model = EfficientNetLite("efficientnet_lite0")
    with pytest.raises(ValueError, match="takes images of shape"):
        model.init(jax.random.key(0), jnp.ones((1, 64, 64, 1)), train=False)
    with pytest.raises(TypeError, match="floating-point"):
        model.init(jax.random.key(0), jnp.ones((1, 64, 64, 3), jnp.uint8), train=False)


def test_training_moves_the_running_statistics():
    block = InvertedBottleneck(BlockConfig(3, 1, 6, 4, 4))
    x = jnp.asarray(images())[..., :1].repeat(4, -1)
    before = block.init(jax.random.key(0), x, train=False)
    outputs, after = block.apply(before, x, train=True, mutable=["batch_stats"])
    assert outputs.shape == x.shape
    for name, tree in after["batch_stats"].items():
        assert np.abs(tree["norm"]["var"] - before["batch_stats"][name]["norm"]["var"]).max() > 1e-3


@pytest.mark.torch
def test_pytorchs_twin_gives_the_same_features(variables):
    torch = pytest.importorskip("torch")
    from pspinal_jax.benchmark.torch_reference import TorchBackbone, load_units

    twin = TorchBackbone("efficientnet_lite0").eval()
    load_units(twin.units, variables["params"])
    features = jax.jit(partial(EfficientNetLite("efficientnet_lite0").apply, train=False))(variables, images())
    with torch.no_grad():
        theirs = twin(torch.from_numpy(images()).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(features, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.torch
@pytest.mark.parametrize("config", [(3, 2, 6, 4, 8), (5, 1, 6, 4, 4), (3, 1, 1, 4, 4)])
def test_pytorchs_block_gives_the_same_gradients_in_training(config):
    torch = pytest.importorskip("torch")
    from pspinal_jax.benchmark.torch_reference import efficientnet_block, load_units

    config = BlockConfig(*config)
    x = np.random.default_rng(0).standard_normal((2, 9, 8, 4))
    with jax.enable_x64(True):
        block = InvertedBottleneck(config, jnp.float64)
        tree = block.init(jax.random.key(0), jnp.asarray(x), train=False)

        def loss(params):
            given = {"params": params, "batch_stats": tree["batch_stats"]}
            return jnp.sum(jnp.sin(block.apply(given, jnp.asarray(x), train=True, mutable=["batch_stats"])[0]))

        value, grads = jax.value_and_grad(loss)(tree["params"])
    twin = efficientnet_block(1, config).double().train()
    load_units(twin.units, {"block_1": tree["params"]})
    theirs = twin(torch.from_numpy(x).permute(0, 3, 1, 2)).sin().sum()
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-9)
    for name, ours in grads.items():
        expected = twin.units[f"block_1/{name}"].conv.weight.grad.numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(ours["kernel"], expected, rtol=1e-7, atol=1e-9)
