"""The head takes what JAX's users give it, in every implementation."""

import copy
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pspinal_jax import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.backbones import VGG5, ResNet
from pspinal_jax.backbones.efficientnet import BlockConfig, InvertedBottleneck

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
    with jax.numpy_rank_promotion("raise"):
        gradient(ProgressiveSpinalHead(3, 4, norm=norm, implementation=implementation), FEATURES)


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
