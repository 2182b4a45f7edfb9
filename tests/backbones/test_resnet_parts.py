"""The parts that the ResNets are made of: their gradients against autodiff of the plain forms."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from pspinal_jax.backbones.resnet import Conv, ConvNorm
from pspinal_jax.layers import conv, norm
from pspinal_jax.layers.conv import conv_same
from pspinal_jax.layers.norm import batch_norm, norm_relu
from pspinal_jax.layers.pooling import max_pool_3x3

COMPILE_FAST = {"xla_backend_optimization_level": 0}


def compiled(function):
    """Compiled quickly rather than well, and run once: most of what these tests cost is compilation."""
    return jax.jit(function, compiler_options=COMPILE_FAST)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 8, 9, 3), (7, 7, 3, 4)),
        ((2, 9, 8, 4), (3, 3, 4, 5)),
        ((1, 1, 2, 4), (3, 3, 4, 5)),
        ((3, 7, 6, 4), (1, 1, 4, 6)),
        ((2, 6, 5, 2), (5, 3, 2, 3)),
    ],
)
def test_strided_convolution_and_gradients_equal_autodiff(shape, kernel):
    def direct(x, k):
        padding = [(side // 2, side // 2) for side in k.shape[:2]]
        return lax.conv_general_dilated(x, k, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        x, k = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=kernel))
        weights = rng.normal(size=direct(x, k).shape)
        np.testing.assert_allclose(conv_same(x, k, 2), direct(x, k), rtol=0, atol=1e-9)
        ours = compiled(jax.grad(lambda *a: (conv_same(*a, 2) * weights).sum(), (0, 1)))(x, k)
        expected = compiled(jax.grad(lambda *a: (direct(*a) * weights).sum(), (0, 1)))(x, k)
        for got, want in zip(ours, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("by_library", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolution_and_gradients_equal_autodiff(stride, by_library, monkeypatch):
    monkeypatch.setattr(conv, "library_convolves", lambda: by_library)
    with jax.enable_x64(True):
        rng = np.random.default_rng(6)
        x, k = jnp.asarray(rng.normal(size=(3, 7, 6, 4))), jnp.asarray(rng.normal(size=(4, 5)))

        def direct(x, k):
            return jnp.einsum("nhwi,io->nhwo", x[:, ::stride, ::stride], k)

        weights = rng.normal(size=direct(x, k).shape)
        np.testing.assert_allclose(conv.pointwise(x, k, stride), direct(x, k), rtol=0, atol=1e-12)
        ours = compiled(jax.grad(lambda *a: (conv.pointwise(*a, stride) * weights).sum(), (0, 1)))(x, k)
        expected = compiled(jax.grad(lambda *a: (direct(*a) * weights).sum(), (0, 1)))(x, k)
        for got, want in zip(ours, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_a_pointwise_convolution_looks_at_every_pixel_by_default():
    assert conv.pointwise(jnp.ones((2, 5, 4, 3)), jnp.ones((3, 7))).shape == (2, 5, 4, 7)


def test_no_transpose_is_copied_for_a_pointwise_gradient():
    """On CPU the copy takes longer than the product."""
    shapes = (jax.ShapeDtypeStruct((2, 56, 56, 24), jnp.float32), jax.ShapeDtypeStruct((24, 64), jnp.float32))
    gradient = jax.grad(lambda *a: jnp.sum(jnp.square(conv.pointwise(*a))), 1)
    text = jax.jit(gradient).lower(*shapes).compile().as_text()
    assert "dot(" in text
    for form in ("f32[64,6272]", "f32[24,6272]"):
        assert form not in text


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 7, 9, 3), (1, 6, 5, 2), (2, 1, 2, 1)])
def test_overlapping_pooling_equals_reduce_window(shape):
    def reference(x):
        around = ((0, 0), (1, 1), (1, 1), (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)

    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=shape).astype(np.float32) - 3)  # below 0: padding with zeros would win
    weights = rng.integers(-9, 9, size=reference(x).shape).astype(np.float32)  # integers add up in any order
    np.testing.assert_array_equal(max_pool_3x3(x), reference(x))
    for inputs in (x, jnp.round(x)):  # rounded: ties, which select-and-scatter gives to the first as well
        ours, expected = (
            compiled(jax.grad(lambda x, f=f: (f(x) * weights).sum()))(inputs) for f in (max_pool_3x3, reference)
        )
        np.testing.assert_array_equal(ours, expected)


def test_batch_norm_equals_autodiff():
    def reference(x, scale, bias):
        return norm.normalize(x, *norm.batch_statistics(x), scale, bias)

    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        x = jnp.asarray(rng.normal(0.7, 1.3, size=(5, 4, 3, 6)))
        scale, bias = jnp.asarray(rng.normal(1, 1, size=6)), jnp.asarray(rng.normal(size=6))
        weights = rng.normal(size=x.shape)
        np.testing.assert_allclose(batch_norm(x, scale, bias)[0], reference(x, scale, bias), atol=1e-12)
        ours = compiled(jax.grad(lambda *a: (batch_norm(*a)[0] * weights).sum(), (0, 1, 2)))(x, scale, bias)
        expected = compiled(jax.grad(lambda *a: (reference(*a) * weights).sum(), (0, 1, 2)))(x, scale, bias)
        for got, want in zip(ours, expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)


def test_the_stem_equals_autodiff():
    """The hand-written gradients behind one another, compiled with fusion: XLA computes some values twice there."""

    def ours(x, kernel, scale, bias):
        return max_pool_3x3(norm_relu(conv_same(x, kernel, 2), scale, bias)[0])

    def reference(x, kernel, scale, bias):
        x = lax.conv_general_dilated(x, kernel, (2, 2), [(3, 3)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(norm.normalize(x, *norm.batch_statistics(x), scale, bias))
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))

    with jax.enable_x64(True):
        rng = np.random.default_rng(6)
        x, kernel = rng.normal(size=(3, 40, 33, 3)), rng.normal(size=(7, 7, 3, 16))
        scale, bias, weights = rng.uniform(0.5, 1.5, 16), rng.normal(size=16), rng.normal(size=(3, 10, 9, 16))
        gradients = [
            jax.jit(jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), (0, 1, 2, 3)))(x, kernel, scale, bias)
            for f in (ours, reference)
        ]
        for got, want in zip(*gradients, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())


def test_a_loop_holds_plain_layout_convolutions_only():
    """Inside lax.scan XLA's CPU compiler leaves other layouts to a naive loop nest (conv.py)."""
    x = jnp.ones((2, 8, 8, 4))
    layer = ConvNorm(Conv(6, 3, 2))
    variables = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False))
    )

    def step(params, _):
        def loss(params):
            outputs, _ = layer.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return outputs.sum()

        return jax.grad(loss)(params), None

    text = jax.jit(lambda p: lax.scan(step, p, length=2)[0]).lower(variables["params"]).as_text()
    layouts = [
        line.split("dim_numbers = ")[1].split(",  window")[0] for line in text.splitlines() if "convolution(" in line
    ]
    assert layouts
    for line in layouts:
        assert line.startswith("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"), line
