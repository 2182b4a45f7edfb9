"""The head takes what JAX's users give it, in every implementation."""

import copy
import functools
import itertools
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pspinal_jax import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.backbones import VGG5, ResNet
from pspinal_jax.backbones.efficientnet import BlockConfig, InvertedBottleneck
from pspinal_jax.interop.functional import progressive_head

IMPLEMENTATIONS = ["unrolled", "fused", "scan"]
FEATURES = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5)), jnp.float32)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def gradient(head, features, variables=None):
    variables = variables or head.init(jax.random.key(0), FEATURES, train=False)

    def loss(params, rows):
        logits, _ = head.apply(
            {**variables, "params": params},
            rows,
            train=True,
            rngs={"dropout": jax.random.key(1)},
            mutable=["batch_stats"],
        )
        return logits.sum()

    return jax.grad(loss, (0, 1))(variables["params"], features)


@every_implementation
@pytest.mark.parametrize("norm", [None, "batch"])
def test_strict_rank_promotion(implementation, norm):
    head = ProgressiveSpinalHead(3, 4, norm=norm, implementation=implementation)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(partial(gradient, head), FEATURES)


@every_implementation
def test_an_empty_batch(implementation):
    grads, of_features = gradient(ProgressiveSpinalHead(3, 4, implementation=implementation), FEATURES[:0])
    assert of_features.shape == (0, 5)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_sizes_as_numpy_integers():
    assert ProgressiveSpinalHead(np.int64(3), np.int32(4)).num_classes == 3
    with pytest.raises(ValueError, match="num_classes must be an integer"):
        ProgressiveSpinalHead(3.0, 4)


@every_implementation
def test_gradients_inside_shard_map_are_those_outside(implementation):
    head = ProgressiveSpinalHead(3, 4, dropout_rate=0.0, implementation=implementation)
    variables = head.init(jax.random.key(0), FEATURES, train=False)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def inside(variables, rows):
        return jax.lax.pmean(jax.grad(lambda v: head.apply(v, rows, train=True).mean())(variables), "data")

    mapped = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    outside = jax.grad(lambda v: head.apply(v, FEATURES, train=True).mean())(variables)
    for ours, theirs in zip(jax.tree.leaves(mapped(variables, FEATURES)), jax.tree.leaves(outside), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def on_an_explicit_mesh(function, *args):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        *args, rows = args
        return jax.jit(function)(*args, jax.device_put(rows, NamedSharding(mesh, P("data"))))


def seeds_on_an_explicit_mesh(function, params, rows):
    mesh = jax.make_mesh((1,), ("seed",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        stacked = jax.tree.map(lambda leaf: np.stack([0 * leaf, leaf]), params)
        stacked = jax.device_put(stacked, NamedSharding(mesh, P("seed")))
        return jax.tree.map(lambda leaf: np.asarray(leaf)[1], jax.jit(jax.vmap(function, (0, None)))(stacked, rows))


def with_nan_checks(function, *args):
    with jax.debug_nans(True):
        return jax.jit(function)(*args)


TRANSFORMATIONS = {
    "explicit mesh": on_an_explicit_mesh,
    "seeds on an explicit mesh": seeds_on_an_explicit_mesh,
    "remat": lambda function, *args: jax.jit(jax.checkpoint(function))(*args),
    "debug_nans": with_nan_checks,
    "vmap": lambda function, params, rows: jax.tree.map(
        lambda leaf: leaf[1],
        jax.jit(jax.vmap(function, (0, None)))(jax.tree.map(lambda leaf: jnp.stack([0 * leaf, leaf]), params), rows),
    ),
}
OPTIONS = {
    "dropout": {"dropout_rate": 0.4},
    "a mask per layer": {"layer_dropout_rate": 0.3},
    "batch norm": {"norm": "batch", "dropout_rate": 0.0},
}


def _cases():
    """In the fast suite, each transformation of two implementations with batch norm, and an explicit mesh of all."""
    for name, options, implementation in itertools.product(TRANSFORMATIONS, OPTIONS, [*IMPLEMENTATIONS, "functional"]):
        fast = options == "batch norm" and (implementation in ("fused", "scan") or name == "explicit mesh")
        yield pytest.param(name, options, implementation, marks=() if fast else pytest.mark.slow)


@functools.cache
def plain_gradients(options, implementation):
    """The function of params and rows that gives a head's gradients, the params, and what it gives of `FEATURES`."""
    chosen = OPTIONS[options]
    if implementation == "functional":
        init, apply = progressive_head(num_classes=3, layer_width=4, **chosen)
        params, batch_stats = init(jax.random.key(0), 5)

        def logits(params, rows):
            return apply(params, batch_stats, rows, train=True, key=jax.random.key(1))[0]
    else:
        head = ProgressiveSpinalHead(3, 4, implementation=implementation, **chosen)
        variables = head.init(jax.random.key(0), FEATURES, train=False)
        params = variables["params"]

        def logits(params, rows):
            options = {"train": True, "rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"]}
            return head.apply({**variables, "params": params}, rows, **options)[0]

    gradients = jax.grad(lambda params, rows: (logits(params, rows) ** 2).sum(), (0, 1))
    return gradients, params, gradients(params, FEATURES)


@pytest.mark.parametrize(("name", "options", "implementation"), list(_cases()))
def test_gradients_under_transformations_are_those_without(name, options, implementation):
    gradients, params, expected = plain_gradients(options, implementation)
    transformed = TRANSFORMATIONS[name](gradients, params, FEATURES)
    for leaf, plain in zip(jax.tree.leaves(transformed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, plain, rtol=1e-4, atol=1e-4)


DROPS = {"dropout_rate": 0.2, "layer_dropout_rate": 0.3}
SEEDED = {
    **{name: ProgressiveSpinalHead(3, 4, norm="batch", implementation=name) for name in IMPLEMENTATIONS},
    **{f"{name}, masks": ProgressiveSpinalHead(3, 4, implementation=name, **DROPS) for name in IMPLEMENTATIONS},
    **{f"{name}, 1 layer": ProgressiveSpinalHead(3, 4, num_layers=1, implementation=name) for name in IMPLEMENTATIONS},
    "scan, masks, 1 layer": ProgressiveSpinalHead(3, 4, num_layers=1, implementation="scan", **DROPS),
    "bfloat16": ProgressiveSpinalHead(3, 4, dtype=jnp.bfloat16),
    "spinal": SpinalHead(3, 4, norm="batch"),
    "mlp": MLPHead(3, 4, norm="batch"),
    "dense": DenseHead(3, dropout_rate=0.2),
}


@pytest.mark.parametrize("name", SEEDED)
def test_seeds_on_an_explicit_mesh_initialise_and_train(name):
    head = SEEDED[name]

    def step(key):
        variables = head.init(key, FEATURES, train=False)

        def loss(params):
            options = {"train": True, "rngs": {"dropout": key}, "mutable": ["batch_stats"]}
            logits, new = head.apply({**variables, "params": params}, FEATURES, **options)
            return jnp.sum(logits.astype(jnp.float32) ** 2), new

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    mesh = jax.make_mesh((1,), ("seed",), axis_types=(AxisType.Explicit,))
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.vmap(step)).eval_shape(jax.device_put(keys, NamedSharding(mesh, P("seed"))))
    for leaf in jax.tree.leaves(mapped):
        assert leaf.shape[0] == 2 and leaf.sharding.spec[0] == "seed"


@every_implementation
@pytest.mark.parametrize(
    "options", [pytest.param(name, marks=() if name == "batch norm" else pytest.mark.slow) for name in OPTIONS]
)
def test_double_precision(implementation, options):
    with jax.enable_x64(True):
        head = ProgressiveSpinalHead(3, 4, implementation=implementation, dtype=jnp.float64, **OPTIONS[options])
        rows = FEATURES.astype(jnp.float64)
        grads, of_features = jax.jit(partial(gradient, head))(rows)
        assert of_features.dtype == jnp.float64 and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


MODULES = {
    **{name: ProgressiveSpinalHead(3, 4, norm="batch", implementation=name) for name in IMPLEMENTATIONS},
    "spinal": SpinalHead(3, 4, norm="batch"),
    "mlp": MLPHead(3, 4, norm="batch"),
}


@pytest.mark.parametrize("name", MODULES)
def test_running_statistics_are_never_dropped_in_silence(name):
    head = MODULES[name]
    variables = head.init(jax.random.key(0), FEATURES, train=False)
    with pytest.raises(ValueError, match="batch_stats is not mutable"):
        head.apply(variables, FEATURES, train=True, rngs={"dropout": jax.random.key(1)})
    head.apply(variables, FEATURES, train=False)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (VGG5(), (2, 28, 28, 1)),
        (ResNet("resnet18"), (2, 32, 32, 3)),
        (InvertedBottleneck(BlockConfig(3, 1, 6, 4, 4)), (2, 8, 8, 4)),
    ],
)
def test_nor_are_the_backbones(module, shape):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(partial(module.init, train=False), jax.random.key(0), images)
    with pytest.raises(ValueError, match="batch_stats is not mutable"):
        jax.eval_shape(partial(module.apply, train=True), variables, images)


@pytest.mark.parametrize(
    "head",
    [ProgressiveSpinalHead(3, 4), SpinalHead(3, 4), MLPHead(3, 4), DenseHead(3)],
    ids=lambda head: type(head).__name__,
)
def test_heads_are_copied_and_pickled(head):
    assert pickle.loads(pickle.dumps(head)) == copy.deepcopy(head) == head


def test_the_nnx_head_is_copied_and_pickled():
    from flax import nnx

    from pspinal_jax.interop.nnx import ProgressiveSpinalHead as Head

    head = Head(5, num_classes=3, layer_width=4, rngs=nnx.Rngs(0))
    head.eval()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        np.testing.assert_array_equal(other(FEATURES), head(FEATURES))
