"""What the tests of the heads share: random variables, kernels that show, comparison on each tensor's own scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspinal_jax import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead, pack_batch_stats, pack_params

IMPLEMENTATIONS = ("unrolled", "fused", "scan")
# Compiling is what these tests wait for, and LLVM's optimisation is half of it.
COMPILE_FAST = {"xla_backend_optimization_level": 0}


def identity(values):
    return values


def abstract_variables(head, num_features, dtype=jnp.float32):
    """Shapes and dtypes of a head's variables, without computing or allocating any."""
    features = jax.ShapeDtypeStruct((2, num_features), dtype)
    return jax.eval_shape(lambda x: head.init(jax.random.key(0), x, train=False), features)


def random_variables(head, num_features, rng, dtype=jnp.float32):
    """Variables with every entry drawn: a fresh norm is 1/0/0/1, which would hide buffers that were swapped."""

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            values = rng.uniform(-1, 1, leaf.shape) * np.sqrt(3 / leaf.shape[0])
        elif name in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = 0.5 * rng.standard_normal(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(head, num_features, dtype))


def zero_variables(head, num_features):
    """Parameters all zero except norm scales (1), for a test to write its own kernels into, as NumPy arrays."""

    def fill(path, leaf):
        return np.full(leaf.shape, float(path[-1].key in ("scale", "var")), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_variables(head, num_features))


def assert_tree_close(actual, expected, tolerance, floor=None):
    """Every tensor of `actual` within `tolerance` of `expected`, relative to that tensor's largest entry.

    `floor(path)`, where given, is the least that is taken for the largest entry.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape and got.dtype == want.dtype, name
        assert np.isfinite(want).all() and np.isfinite(got).all(), name
        scale = np.abs(want).max(initial=0.0)
        if floor is not None:
            scale = max(scale, floor(path))
        assert np.abs(got - want).max(initial=0.0) <= tolerance * scale, name


@functools.lru_cache
def _compiled(head, train, mutable):
    def run(variables, features, key):
        rngs = None if key is None else {"dropout": key}
        return head.apply(variables, features, train=train, rngs=rngs, mutable=mutable)

    return jax.jit(run, compiler_options=COMPILE_FAST)


def apply(head, variables, features, *, train, key=None, mutable=False):
    """`head.apply` as one compiled program: operation by operation, each shape of each operation would be compiled.

    Without `mutable`, logits only; new statistics are computed, as they must be, and dropped.
    """
    if train and not mutable and "batch_stats" in variables:
        return _compiled(head, train, "batch_stats")(variables, features, key)[0]
    return _compiled(head, train, mutable)(variables, features, key)


@functools.partial(jax.jit, compiler_options=COMPILE_FAST)
def pack(variables):
    """All of a head's variables in packed form."""
    packed = {"params": pack_params(variables["params"])}
    if "batch_stats" in variables:
        packed["batch_stats"] = pack_batch_stats(variables["batch_stats"])
    return packed


def initialise(head, features, train=False):
    init = jax.jit(lambda key, x: head.init(key, x, train=train), compiler_options=COMPILE_FAST)
    return init(jax.random.key(0), features)


@functools.lru_cache
def features_mask(num_features, rows, rate, seed):
    """What a head with that dropout rate multiplies its features with to make u, [rows, num_features].

    Read off a head whose logits are u: the output's kernel is the identity on u.
    """
    head = ProgressiveSpinalHead(num_features, 1, num_layers=1, dropout_rate=rate)
    variables = zero_variables(head, num_features)
    variables["params"]["output"]["kernel"][:num_features] = np.eye(num_features)
    features = np.ones((rows, num_features), np.float32)
    return np.asarray(apply(head, variables, features, train=True, key=jax.random.key(seed)))


@functools.lru_cache
def layer_masks(num_features, width, num_layers, rows, rate, seed):
    """What a head with that layer dropout rate multiplies the input of each layer, and of the output, with.

    All inputs are made one (u by rate 0, y_j by a zero kernel and a bias of one), and layer i's pre-activations are
    made a block of its input, which the activation function gets to see.
    """
    total = num_features + num_layers * width
    head = ProgressiveSpinalHead(
        total, width, num_layers, dropout_rate=0.0, layer_dropout_rate=rate, implementation="unrolled"
    )

    @jax.jit
    def probe(variables):
        seen, rngs = [], {"dropout": jax.random.key(seed)}
        spying = head.clone(activation=lambda values: seen.append(values) or jnp.ones_like(values))
        logits = spying.apply(variables, np.ones((rows, num_features), np.float32), train=True, rngs=rngs)
        return seen, logits

    masks = [np.zeros((rows, num_features + i * width), np.float32) for i in range(num_layers)]
    for start in range(0, total, width):
        variables = zero_variables(head, num_features)
        variables["params"]["output"]["kernel"][:] = np.eye(total)
        for i in range(1, num_layers + 1):
            block = variables["params"][f"layer_{i}"]["kernel"][start : start + width]
            block[:] = np.eye(width)[: len(block)]
        seen, logits = probe(variables)
        for mask, values in zip(masks, seen, strict=True):
            mask[:, start : start + width] = values[:, : max(0, mask.shape[1] - start)]
    return [*masks, np.asarray(logits)]


every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


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


HEADS = {
    "unrolled": lambda **kw: ProgressiveSpinalHead(num_classes=4, layer_width=6, **kw),
    "fused": lambda **kw: ProgressiveSpinalHead(num_classes=4, layer_width=6, implementation="fused", **kw),
    "scan": lambda **kw: ProgressiveSpinalHead(num_classes=4, layer_width=6, implementation="scan", **kw),
    "spinal": lambda **kw: SpinalHead(num_classes=4, layer_width=6, **kw),
    "mlp": lambda **kw: MLPHead(num_classes=4, layer_width=6, **kw),
    "dense": lambda **kw: DenseHead(num_classes=4, **kw),
}


every_head = pytest.mark.parametrize("name", HEADS)


def numpy_norm(pre, layer, running, train):
    mean, var = (pre.mean(0), pre.var(0)) if train else (running["mean"], running["var"])
    return (pre - mean) / np.sqrt(var + 1e-5) * layer["scale"] + layer["bias"]


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def head_params(**attributes):
    return random_variables(ProgressiveSpinalHead(4, 3, **attributes), 8, np.random.default_rng(0))["params"]


def without(tree, *names):
    return {name: value for name, value in tree.items() if name not in names}


ALL_HEADS = {
    "progressive": (ProgressiveSpinalHead, {"num_classes": 4, "layer_width": 3}),
    "spinal": (SpinalHead, {"num_classes": 4, "layer_width": 3}),
    "mlp": (MLPHead, {"num_classes": 4, "layer_width": 3}),
    "dense": (DenseHead, {"num_classes": 4}),
}
