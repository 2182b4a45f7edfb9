"""VGG-5 and its parts, without PyTorch."""

import math

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import lax
from jax import numpy as jnp

from pspinal_jax.backbones import VGG5
from pspinal_jax.layers import norm
from pspinal_jax.layers.conv import conv_same
from pspinal_jax.layers.norm import norm_relu
from pspinal_jax.layers.pooling import max_pool_2x2


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(4, 28, 28, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def variables(images):
    return jax.jit(lambda key: VGG5().init(key, images, train=False))(jax.random.key(0))


def relative(ours, expected):
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    return np.abs(ours - expected).max() / np.abs(expected).max()


def test_parameter_tree(variables):
    """Names and shapes as documented, and the published script's parameter count."""
    widths = {1: (64, 64), 2: (128, 128), 3: (256,) * 3, 4: (256,) * 3}
    params, stats, fan_in = {}, {}, 1
    for s, stage in widths.items():
        for i, width in enumerate(stage, start=1):
            name = f"stage_{s}/conv_{i}"
            params[f"{name}/kernel"] = (3, 3, fan_in, width)
            params |= {f"{name}/{leaf}": (width,) for leaf in ("bias", "norm/scale", "norm/bias")}
            stats |= {f"{name}/norm/{leaf}": (width,) for leaf in ("mean", "var")}
            fan_in = width
    for collection, expected in (("params", params), ("batch_stats", stats)):
        assert {k: v.shape for k, v in flatten_dict(variables[collection], sep="/").items()} == expected
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 3_508_416


def test_initialisation(variables):
    """Kernels normal(0, sqrt(2 / (9 c_out))), biases uniform in +-1/sqrt(9 c_in), norm 1/0/0/1."""
    flat = flatten_dict(variables["params"], sep="/")
    for name, kernel in flat.items():
        if not name.endswith("kernel"):
            continue
        layer, (_, _, fan_in, width) = name.removesuffix("/kernel"), kernel.shape
        assert np.std(kernel) == pytest.approx((2 / (9 * width)) ** 0.5, rel=4 / (2 * kernel.size) ** 0.5)
        assert abs(np.mean(kernel)) < 5 * np.std(kernel) / kernel.size**0.5
        bias, bound = flat[f"{layer}/bias"], (9 * fan_in) ** -0.5
        assert 0.9 * bound < np.abs(bias).max() <= bound and np.min(bias) < -0.8 * bound
        assert np.all(flat[f"{layer}/norm/scale"] == 1) and np.all(flat[f"{layer}/norm/bias"] == 0)
    for name, value in flatten_dict(variables["batch_stats"], sep="/").items():
        assert np.all(value == (0 if name.endswith("mean") else 1))


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "result"),
    [(None, jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32, jnp.bfloat16), (None, jnp.bfloat16, jnp.float32)],
)
def test_dtypes(images, dtype, param_dtype, result):
    model = VGG5(dtype=dtype, param_dtype=param_dtype)
    init = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(init["params"])} == {jnp.dtype(param_dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(init["batch_stats"])} == {jnp.dtype(jnp.float32)}
    for train in (False, True):
        features, state = jax.eval_shape(
            lambda v, train=train: model.apply(v, images, train=train, mutable=["batch_stats"]), init
        )
        assert (features.shape, features.dtype) == ((4, 256), result)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_is_close_to_float32(images, variables):
    def features(dtype):
        apply = jax.jit(lambda v: VGG5(dtype=dtype).apply(v, images, train=True, mutable=["batch_stats"])[0])
        return apply(variables)

    half = features(jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert 0 < relative(half, features(None)) < 0.1


@pytest.mark.parametrize("shape", [(4, 28, 28), (4, 32, 32, 1), (4, 28, 28, 3)])
def test_other_image_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="28, 28, 1"):
        VGG5().init(jax.random.key(0), jnp.ones(shape), train=False)


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        VGG5().init(jax.random.key(0), np.ones((4, 28, 28, 1), np.uint8), train=False)


def test_running_statistics_are_never_dropped_in_silence(images, variables):
    with pytest.raises(ValueError, match="batch_stats is not mutable"):
        jax.eval_shape(lambda v: VGG5().apply(v, images, train=True), variables)


def _direct(x, k):
    padding = [(side // 2, side // 2) for side in k.shape[:2]]
    return lax.conv_general_dilated(x, k, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 7, 7, 4), (3, 3, 4, 6)),
        ((3, 5, 9, 1), (3, 3, 1, 5)),
        ((1, 6, 4, 3), (5, 3, 3, 2)),
        ((2, 1, 1, 3), (3, 3, 3, 3)),
        ((2, 2, 2, 5), (3, 3, 5, 4)),
        ((2, 3, 3, 64), (3, 3, 64, 64)),
        ((2, 9, 11, 64), (3, 3, 64, 32)),
        ((2, 8, 8, 5), (1, 1, 5, 7)),
    ],
)
def test_convolution_and_gradients_equal_autodiff(shape, kernel):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x, k = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=kernel))
        weights = jnp.asarray(rng.normal(size=(*shape[:3], kernel[3])))
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(conv_same(x, k), _direct(x, k), rtol=0, atol=1e-9)
        ours = jax.grad(lambda *a: (conv_same(*a) * weights).sum(), (0, 1))(x, k)
        expected = jax.grad(lambda *a: (_direct(*a) * weights).sum(), (0, 1))(x, k)
        for got, want in zip(ours, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
    assert jnp.ones(()).dtype == jnp.float32


def test_convolution_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="odd kernel sides"):
        conv_same(jnp.ones((1, 4, 4, 2)), jnp.ones((2, 3, 2, 2)))
    with pytest.raises(ValueError, match="channels"):
        conv_same(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2)))


@pytest.mark.parametrize("shape", [(2, 28, 28, 3), (2, 7, 7, 3), (1, 3, 3, 2), (2, 5, 2, 1)])
def test_pooling_equals_reduce_window(shape):
    def reference(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=shape).astype(np.float32))
    weights = rng.normal(size=reference(x).shape).astype(np.float32)
    np.testing.assert_array_equal(max_pool_2x2(x), reference(x))
    for inputs in (x, jnp.round(x)):  # rounded: ties, which select-and-scatter gives to the first as well
        ours, expected = (jax.grad(lambda x, f=f: (f(x) * weights).sum())(inputs) for f in (max_pool_2x2, reference))
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(("epsilon", "cap"), [(norm.EPSILON, math.inf), (1e-3, 0.9)])
def test_norm_relu_equals_autodiff(epsilon, cap):
    def reference(x, scale, bias):
        return jnp.clip(norm.normalize(x, *norm.batch_statistics(x), scale, bias, epsilon), 0, cap)

    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        x = jnp.asarray(rng.normal(0.7, 1.3, size=(5, 4, 3, 6)))
        scale, bias = jnp.asarray(rng.normal(1, 1, size=6)), jnp.asarray(rng.normal(size=6))
        weights = jnp.asarray(rng.normal(size=x.shape))
        outputs, mean, variance = norm_relu(x, scale, bias, epsilon, cap)
        np.testing.assert_allclose(outputs, reference(x, scale, bias), atol=1e-12)
        np.testing.assert_allclose(mean, np.mean(x, (0, 1, 2)), atol=1e-12)
        np.testing.assert_allclose(variance, np.var(x, (0, 1, 2)), atol=1e-12)
        ours = jax.grad(lambda *a: (norm_relu(*a, epsilon, cap)[0] * weights).sum(), (0, 1, 2))(x, scale, bias)
        expected = jax.grad(lambda *a: (reference(*a) * weights).sum(), (0, 1, 2))(x, scale, bias)
        for got, want in zip(ours, expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.slow
def test_gradient_inside_a_scan_equals_outside(images, variables):
    """The gradient that a loop on CPU needs written by hand (conv.py says why) is the gradient."""

    def gradient(params, x):
        def loss(params):
            features, _ = VGG5().apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.mean(jnp.sin(features))

        return jax.grad(loss)(params)

    batches = jnp.stack([images, images[::-1] * 0.5])
    inside = jax.jit(lambda p, xs: lax.scan(lambda c, x: (c, gradient(c, x)), p, xs)[1])(variables["params"], batches)
    outside = [jax.jit(gradient)(variables["params"], x) for x in batches]
    for index, expected in enumerate(outside):
        for name, value in flatten_dict(expected, sep="/").items():
            got = flatten_dict(inside, sep="/")[name][index]
            if name.endswith("/bias") and "norm" not in name:
                assert np.all(np.asarray(got) == 0) and np.all(np.asarray(value) == 0)
            else:
                assert relative(got, value) < 1e-5, name
