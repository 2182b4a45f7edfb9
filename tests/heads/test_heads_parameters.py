"""The parameters: how many, under which names, and one tree for both implementations."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads_support import (
    IMPLEMENTATIONS,
    KEY,
    abstract_variables,
    apply,
    assert_identical,
    assert_tree_close,
    every_implementation,
    initialise,
    pack,
    random_variables,
)

from pspinal_jax import (
    DenseHead,
    MLPHead,
    ProgressiveSpinalHead,
    SpinalHead,
    pack_batch_stats,
    pack_params,
    unpack_batch_stats,
)

# Counts and names.


@every_implementation
@pytest.mark.parametrize(
    ("num_features", "width", "num_classes", "norm", "expected"),
    [
        pytest.param(784, 128, 10, "batch", 514_218, id="MNIST"),
        pytest.param(256, 64, 10, None, 95_498, id="KMNIST and EMNIST-Digits"),
        pytest.param(256, 64, 10, "batch", 96_010, id="QMNIST"),
        pytest.param(256, 128, 26, None, 249_882, id="EMNIST-Letters"),
        pytest.param(256, 128, 62, None, 277_566, id="EMNIST-Letters as published"),
        pytest.param(2048, 200, 101, None, 2_166_949, id="Caltech-101"),
        pytest.param(2048, 1024, 131, None, 15_489_155, id="Fruits-360"),
        pytest.param(2048, 1024, 225, None, 16_066_785, id="Bird-225"),
        pytest.param(2048, 1024, 250, None, 16_220_410, id="Bird-225 and STL-10 as published"),
        pytest.param(2048, 1024, 10, None, 14_745_610, id="STL-10"),
    ],
)
def test_parameter_counts_are_those_of_the_paper(implementation, num_features, width, num_classes, norm, expected):
    head = ProgressiveSpinalHead(num_classes, width, norm=norm, implementation=implementation)
    params = abstract_variables(head, num_features)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def shapes(tree):
    return {"/".join(path): leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree).items()}


@every_implementation
def test_documented_names_and_shapes(implementation):
    head = ProgressiveSpinalHead(5, 3, num_layers=2, norm="batch", implementation=implementation)
    layers = {
        f"layer_{i}/{name}": shape
        for i, fan_in in ((1, 7), (2, 10))
        for name, shape in {"kernel": (fan_in, 3), "bias": (3,), "norm/scale": (3,), "norm/bias": (3,)}.items()
    }
    variables = abstract_variables(head, 7)
    assert shapes(variables["params"]) == layers | {"output/kernel": (13, 5), "output/bias": (5,)}
    statistics = {f"layer_{i}/norm/{name}": (3,) for i in (1, 2) for name in ("mean", "var")}
    assert shapes(variables["batch_stats"]) == statistics
    without_norm = abstract_variables(head.clone(norm=None), 7)
    assert set(without_norm) == {"params"}
    assert shapes(without_norm["params"]) == {
        name: s for name, s in shapes(variables["params"]).items() if "norm" not in name
    }


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (SpinalHead(5, 3, num_layers=2, norm="batch"), {"layer_1": (4, 3), "layer_2": (7, 3), "output": (6, 5)}),
        (MLPHead(5, 3, norm="batch"), {"layer_1": (8, 3), "output": (3, 5)}),
        (DenseHead(5), {"output": (8, 5)}),
    ],
    ids=["spinal", "mlp", "dense"],
)
def test_documented_names_and_shapes_of_the_baselines(head, expected):
    variables = abstract_variables(head, 8)
    want = {}
    for name, (fan_in, width) in expected.items():
        want |= {f"{name}/kernel": (fan_in, width), f"{name}/bias": (width,)}
        if name != "output":
            want |= {f"{name}/norm/scale": (width,), f"{name}/norm/bias": (width,)}
    assert shapes(variables["params"]) == want
    statistics = {f"{name}/norm/{s}": (3,) for name in expected if name != "output" for s in ("mean", "var")}
    assert shapes(variables.get("batch_stats", {})) == statistics


def test_packed_names_and_shapes():
    variables = abstract_variables(ProgressiveSpinalHead(5, 3, num_layers=4, norm="batch"), 7)
    assert shapes(jax.eval_shape(pack_params, variables["params"])) == {
        "first_kernel": (7, 3),
        "features_kernel": (7, 14),
        "hidden_kernel": (4, 12, 3),
        "output_kernel": (12, 5),
        "hidden_bias": (4, 3),
        "output_bias": (5,),
        "norm_scale": (4, 3),
        "norm_bias": (4, 3),
    }
    packed = jax.eval_shape(pack_batch_stats, variables["batch_stats"])
    assert shapes(packed) == {"norm_mean": (4, 3), "norm_var": (4, 3)}


# One tree for all implementations.


def test_all_implementations_initialise_alike():
    features = jnp.ones((2, 6))
    unrolled, fused, scan = (
        initialise(ProgressiveSpinalHead(4, 3, norm="batch", implementation=name), features) for name in IMPLEMENTATIONS
    )
    assert_identical(fused, unrolled)
    assert_identical(scan, unrolled)


@every_implementation
def test_a_checkpoint_loads_into_the_other_implementation(implementation):
    other = IMPLEMENTATIONS[1 - IMPLEMENTATIONS.index(implementation)]
    source = ProgressiveSpinalHead(4, 3, norm="batch", implementation=implementation)
    variables = random_variables(source, 6, np.random.default_rng(0))
    target = source.clone(implementation=other)
    restored = flax.serialization.from_bytes(
        initialise(target, jnp.ones((2, 6))), flax.serialization.to_bytes(variables)
    )
    assert_identical(jax.tree.map(jnp.asarray, restored), variables)
    features = np.random.default_rng(1).standard_normal((8, 6)).astype(np.float32)
    for train in (True, False):
        expected = apply(source, variables, features, train=train, key=KEY)
        np.testing.assert_allclose(
            apply(target, restored, features, train=train, key=KEY), expected, rtol=1e-4, atol=1e-5
        )


@every_implementation
def test_a_head_inside_a_model_takes_packed_parameters(implementation):
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, inputs, train):
            features = flax.linen.Dense(6)(inputs)
            return ProgressiveSpinalHead(4, 3, norm="batch", implementation=implementation, name="head")(
                features, train
            )

    variables = random_variables(Model(), 5, np.random.default_rng(0))
    head = pack({collection: tree["head"] for collection, tree in variables.items()})
    packed = {"params": variables["params"] | {"head": head["params"]}, "batch_stats": {"head": head["batch_stats"]}}
    inputs = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
    expected, new = apply(Model(), variables, inputs, train=True, key=KEY, mutable="batch_stats")
    logits, packed_new = apply(Model(), packed, inputs, train=True, key=KEY, mutable="batch_stats")
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    unpacked = {"head": unpack_batch_stats(packed_new["batch_stats"]["head"])}
    assert_tree_close(unpacked, new["batch_stats"], 1e-5)
