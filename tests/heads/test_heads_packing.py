"""Packing parameters and statistics, and undoing it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads_support import (
    COMPILE_FAST,
    KEY,
    assert_identical,
    assert_tree_close,
    every_implementation,
    head_params,
    random_variables,
    without,
)

from pspinal_jax import (
    MLPHead,
    ProgressiveSpinalHead,
    SpinalHead,
    fuse_params,
    pack_batch_stats,
    pack_params,
    unfuse_params,
    unpack_batch_stats,
    unpack_params,
)


@pytest.mark.parametrize(
    ("num_layers", "norm", "dtype"),
    # Eleven layers: layer_10 sorts before layer_2 in the tree.
    [(1, None, jnp.float32), (1, "batch", jnp.float32), (2, "batch", jnp.bfloat16), (11, "batch", jnp.float32)],
)
def test_packing_is_undone_exactly(num_layers, norm, dtype):
    head = ProgressiveSpinalHead(5, 3, num_layers=num_layers, norm=norm, param_dtype=dtype)
    variables = random_variables(head, 7, np.random.default_rng(0))
    stats = variables.get("batch_stats", {})

    @functools.partial(jax.jit, compiler_options=COMPILE_FAST)
    def there_and_back(params, stats):
        packed, packed_stats = pack_params(params), pack_batch_stats(stats)
        unfused = unfuse_params(fuse_params(params))
        return (packed, packed_stats), (unpack_params(packed), unpack_batch_stats(packed_stats)), unfused

    packed, unpacked, unfused = there_and_back(variables["params"], stats)
    assert_identical(unpacked, (variables["params"], stats))
    assert_identical(unfused, variables["params"])
    assert_identical(there_and_back(*unpacked)[0], packed)


def test_packing_keeps_every_entry_and_adds_zeros_only():
    params = random_variables(ProgressiveSpinalHead(5, 3, norm="batch"), 7, np.random.default_rng(0))["params"]
    before, packed, fused = (
        np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]))
        for tree in (params, jax.jit(pack_params)(params), jax.jit(fuse_params)(params))
    )
    np.testing.assert_array_equal(packed[packed != 0], before)
    np.testing.assert_array_equal(fused, before)


@every_implementation
def test_gradients_of_packed_parameters_unpack_to_those_of_the_tree(implementation):
    head = ProgressiveSpinalHead(5, 3, implementation=implementation)
    params = random_variables(head, 7, np.random.default_rng(0))["params"]
    features = np.random.default_rng(1).standard_normal((8, 7)).astype(np.float32)

    def loss(params):
        return (head.apply({"params": params}, features, train=True, rngs={"dropout": KEY}) ** 2).sum()

    @functools.partial(jax.jit, compiler_options=COMPILE_FAST)
    def gradients(params):
        packed = jax.grad(loss)(pack_params(params))
        unpacked = unpack_params(packed)
        return packed, pack_params(unpacked), unpacked, jax.grad(loss)(params)

    packed, packed_again, unpacked, expected = gradients(params)
    assert_tree_close(unpacked, expected, 1e-5)
    # The rows that stand for no parameter stay zero under any optimiser only if their gradient is exactly zero.
    assert_identical(packed_again, packed)


def bad_trees():
    tree = head_params()
    rng = np.random.default_rng(0)
    return [
        pytest.param({}, id="empty"),
        pytest.param({"params": tree}, id="all variables"),
        pytest.param(pack_params(tree), id="packed already"),
        pytest.param(fuse_params(tree), id="fused already"),
        pytest.param(tree | {"layer_2": tree["layer_3"]}, id="a layer of another place"),
        pytest.param(without(tree, "output"), id="no output"),
        pytest.param(without(tree, "layer_1"), id="no first layer"),
        pytest.param(without(tree, "layer_2"), id="a layer missing between"),
        pytest.param(without(tree, "layer_4"), id="the last layer missing"),
        pytest.param(tree | {"other": tree["output"]}, id="an entry too many"),
        pytest.param(tree | {"layer_2": without(tree["layer_2"], "bias")}, id="no bias"),
        pytest.param(tree | {"layer_2": head_params(norm="batch")["layer_2"]}, id="one norm"),
        pytest.param(head_params(norm="batch") | {"layer_2": tree["layer_2"]}, id="one norm missing"),
        pytest.param(random_variables(SpinalHead(4, 3), 8, rng)["params"], id="spinal"),
        pytest.param(random_variables(MLPHead(4, 3), 8, rng)["params"], id="mlp"),
    ]


@pytest.mark.parametrize("tree", bad_trees())
@pytest.mark.parametrize("convert", [pack_params, fuse_params])
def test_what_is_not_a_head_is_refused(convert, tree):
    with pytest.raises(ValueError, match=f"{convert.__name__} expects"):
        convert(tree)


def test_unpack_params_names_what_is_missing():
    packed = pack_params(head_params())
    with pytest.raises(ValueError, match="unpack_params misses hidden_bias, output_bias; it takes what pack_params"):
        unpack_params(without(packed, "hidden_bias", "output_bias"))
    with pytest.raises(ValueError, match="unpack_params misses first_kernel"):
        unpack_params(unpack_params(packed))
    with pytest.raises(ValueError, match="unfuse_params expects what fuse_params returns, got features_kernel"):
        unfuse_params(packed)
