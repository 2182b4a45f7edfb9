"""The parameters: how many, under which names, in which dtypes; packing them; and what is refused."""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads_support import (
    COMPILE_FAST,
    IMPLEMENTATIONS,
    abstract_variables,
    apply,
    assert_tree_close,
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
    unpack_params,
)

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
KEY = jax.random.key(0)


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


# Counts and names.


@both
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


@both
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


# One tree for both implementations.


def test_both_implementations_initialise_alike():
    features = jnp.ones((2, 6))
    unrolled, scan = (
        initialise(ProgressiveSpinalHead(4, 3, norm="batch", implementation=name), features) for name in IMPLEMENTATIONS
    )
    assert_identical(scan, unrolled)


@both
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


@both
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


# Packing.


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
        return (packed, packed_stats), (unpack_params(packed), unpack_batch_stats(packed_stats))

    packed, unpacked = there_and_back(variables["params"], stats)
    assert_identical(unpacked, (variables["params"], stats))
    assert_identical(there_and_back(*unpacked)[0], packed)


def test_packing_keeps_every_entry_and_adds_zeros_only():
    params = random_variables(ProgressiveSpinalHead(5, 3, norm="batch"), 7, np.random.default_rng(0))["params"]
    before, after = (
        np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]))
        for tree in (params, jax.jit(pack_params)(params))
    )
    np.testing.assert_array_equal(after[after != 0], before)


@both
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


def head_params(**attributes):
    return random_variables(ProgressiveSpinalHead(4, 3, **attributes), 8, np.random.default_rng(0))["params"]


def without(tree, *names):
    return {name: value for name, value in tree.items() if name not in names}


def bad_trees():
    tree = head_params()
    rng = np.random.default_rng(0)
    known = pytest.mark.xfail(reason="pack_params takes it, or ends in a KeyError", strict=True)
    return [
        pytest.param({}, id="empty"),
        pytest.param({"params": tree}, id="all variables"),
        pytest.param(pack_params(tree), id="packed already"),
        pytest.param(without(tree, "output"), id="no output"),
        pytest.param(without(tree, "layer_1"), id="no first layer"),
        pytest.param(without(tree, "layer_2"), id="a layer missing between", marks=known),
        pytest.param(without(tree, "layer_4"), id="the last layer missing", marks=known),
        pytest.param(tree | {"other": tree["output"]}, id="an entry too many", marks=known),
        pytest.param(tree | {"layer_2": without(tree["layer_2"], "bias")}, id="no bias", marks=known),
        pytest.param(tree | {"layer_2": head_params(norm="batch")["layer_2"]}, id="one norm", marks=known),
        pytest.param(head_params(norm="batch") | {"layer_2": tree["layer_2"]}, id="one norm missing", marks=known),
        pytest.param(random_variables(SpinalHead(4, 3), 8, rng)["params"], id="spinal", marks=known),
        pytest.param(random_variables(MLPHead(4, 3), 8, rng)["params"], id="mlp", marks=known),
    ]


@pytest.mark.parametrize("tree", bad_trees())
def test_pack_params_refuses_what_is_not_a_head(tree):
    with pytest.raises(ValueError, match="pack_params expects"):
        pack_params(tree)


def test_unpack_params_names_what_is_missing():
    packed = pack_params(head_params())
    with pytest.raises(ValueError, match="unpack_params misses hidden_bias, output_bias; it takes what pack_params"):
        unpack_params(without(packed, "hidden_bias", "output_bias"))
    with pytest.raises(ValueError, match="unpack_params misses first_kernel"):
        unpack_params(unpack_params(packed))


# What is refused.

ALL_HEADS = {
    "progressive": (ProgressiveSpinalHead, {"num_classes": 4, "layer_width": 3}),
    "spinal": (SpinalHead, {"num_classes": 4, "layer_width": 3}),
    "mlp": (MLPHead, {"num_classes": 4, "layer_width": 3}),
    "dense": (DenseHead, {"num_classes": 4}),
}
BAD_ATTRIBUTES = [
    *(
        (name, value, f"{name} must be an integer >= 1, got {value!r}")
        for name in ("num_classes", "layer_width", "num_layers")
        for value in (0, -1, 2.0, True, "3")
    ),
    *(
        (name, value, f"{name} must be in [0, 1), got {value!r}")
        for name in ("dropout_rate", "layer_dropout_rate")
        for value in (-0.1, 1.0, 1.5, float("nan"))
    ),
    ("norm", "layer", "norm must be one of None, 'batch', got 'layer'"),
    ("norm", True, "norm must be one of None, 'batch', got True"),
    ("implementation", "loop", "implementation must be one of 'unrolled', 'scan', got 'loop'"),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        pytest.param(kind, *case, id=f"{kind}-{case[0]}={case[1]!r}")
        for kind, (head, _) in ALL_HEADS.items()
        for case in BAD_ATTRIBUTES
        if case[0] in head.__dataclass_fields__
    ],
)
def test_attributes_outside_their_range_are_refused(kind, name, value, message):
    head, attributes = ALL_HEADS[kind]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        head(**(attributes | {name: value}))


every_head = pytest.mark.parametrize("kind", ALL_HEADS)


def call(head, features, train=False):
    return jax.eval_shape(lambda: head.init_with_output({"params": KEY, "dropout": KEY}, features, train=train))


@every_head
@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        pytest.param(
            np.zeros((2, 8), np.uint8), TypeError, "must be a floating-point array, got uint8; convert", id="bytes"
        ),
        pytest.param(np.zeros((2, 8), np.int32), TypeError, "must be a floating-point array, got int32", id="integers"),
        pytest.param(np.zeros((2, 8), bool), TypeError, "must be a floating-point array, got bool", id="booleans"),
        pytest.param(np.zeros((2, 8), np.complex64), TypeError, "floating-point array, got complex64", id="complex"),
        pytest.param([[0.0] * 8] * 2, TypeError, "must be a floating-point array, got list", id="a list"),
        pytest.param(1.0, TypeError, "must be a floating-point array, got float", id="a number"),
        pytest.param(np.float32(1), ValueError, r"shape \[..., D\] with D >= 1, got \(\)", id="no axis"),
        pytest.param(np.zeros((2, 0), np.float32), ValueError, r"with D >= 1, got \(2, 0\)", id="no features"),
    ],
)
def test_bad_features_are_refused(kind, features, error, message):
    head, attributes = ALL_HEADS[kind]
    with pytest.raises(error, match=message):
        call(head(**attributes), features)


@pytest.mark.parametrize("kind", ["progressive", "spinal", "mlp"])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8), (0, 8)])
def test_batch_norm_does_not_learn_from_one_row(kind, shape):
    head, attributes = ALL_HEADS[kind]
    head = head(norm="batch", dropout_rate=0.0, **attributes)
    variables = random_variables(head, 8, np.random.default_rng(0))
    features = jnp.zeros(shape)
    with pytest.raises(
        ValueError, match=r"batch norm in training needs at least 2 rows, got features of shape .*larger batch"
    ):
        head.apply(variables, features, train=True)
    # In evaluation one row will do, and so it will to initialise.
    logits = jax.eval_shape(lambda: head.apply(variables, features, train=False))
    assert logits.shape == (*shape[:-1], 4)
    assert call(head, features, train=True)[0].shape == (*shape[:-1], 4)


def test_spinal_needs_two_features():
    with pytest.raises(ValueError, match=r"SpinalHead splits the features in two, got shape \(2, 1\)"):
        call(SpinalHead(4, 3), jnp.zeros((2, 1)))


@both
def test_parameters_of_another_head_are_refused(implementation):
    features = jnp.zeros((2, 8))
    params = head_params()
    for attributes in ({"layer_width": 5}, {"num_layers": 3}):
        head = ProgressiveSpinalHead(
            **({"num_classes": 4, "layer_width": 3, "implementation": implementation} | attributes)
        )
        with pytest.raises(ValueError, match=r"packed variables do not fit this head: .*hidden_kernel is"):
            head.apply({"params": pack_params(params)}, features, train=False)
    head = ProgressiveSpinalHead(4, 3, implementation=implementation)
    with pytest.raises(ValueError, match=r"packed variables do not fit this head: first_kernel is"):
        head.apply({"params": pack_params(params)}, jnp.zeros((2, 7)), train=False)
    with pytest.raises(flax.errors.ScopeParamShapeError, match="layer_1"):
        head.apply({"params": params}, jnp.zeros((2, 7)), train=False)


@both
@pytest.mark.parametrize("wrong", ["num_classes", "norm", "batch_stats", "output_kernel"])
def test_packed_variables_that_do_not_fit_are_refused(implementation, wrong):
    head = ProgressiveSpinalHead(5 if wrong == "num_classes" else 4, 3, norm="batch", implementation=implementation)
    variables = random_variables(head.clone(num_classes=4), 8, np.random.default_rng(0))
    packed = pack(variables)
    if wrong == "norm":
        packed["params"] = without(packed["params"], "norm_scale", "norm_bias")
    elif wrong == "batch_stats":
        packed = without(packed, "batch_stats")
    elif wrong == "output_kernel":
        packed["params"] = without(packed["params"], "output_kernel")
    with pytest.raises(ValueError, match="do not fit"):
        head.apply(packed, jnp.zeros((2, 8)), train=False)


@pytest.mark.parametrize("kind", ALL_HEADS)
def test_float64_features_are_taken_as_float32_without_x64(kind):
    # What NumPy makes by default.
    head, attributes = ALL_HEADS[kind]
    logits, _ = call(head(**attributes), np.zeros((2, 8)))
    assert logits.dtype == jnp.float32


# Low precision.


def gradient_and_logits(head, variables, features, key):
    def loss(params):
        logits, new = head.apply(
            variables | {"params": params}, features, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return jnp.mean(logits.astype(jnp.float32) ** 2), (logits, new)

    return jax.jit(jax.grad(loss, has_aux=True), compiler_options=COMPILE_FAST)(variables["params"])


@both
@pytest.mark.parametrize(("norm", "layer_dropout_rate", "packed"), [(None, 0.0, False), ("batch", 0.5, True)])
def test_bfloat16_compute_with_float32_parameters(implementation, norm, layer_dropout_rate, packed):
    rates = {"layer_dropout_rate": layer_dropout_rate}
    head = ProgressiveSpinalHead(
        5, 16, num_layers=3, norm=norm, activation=jnp.tanh, implementation=implementation, **rates
    )
    variables = random_variables(head, 24, np.random.default_rng(0))
    if packed:
        variables = pack(variables)
    features = jnp.asarray(np.random.default_rng(1).standard_normal((64, 24)), jnp.float32)
    grads, (logits, new) = gradient_and_logits(head.clone(dtype=jnp.bfloat16), variables, features, KEY)
    exact_grads, (exact_logits, exact_new) = gradient_and_logits(head, variables, features, KEY)

    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, new))} == {jnp.dtype("float32")}
    # bfloat16 keeps 8 bits: 0.4 % an operation; a few of them in a row are well within 8 % of the largest entry.
    assert_tree_close(logits.astype(jnp.float32), exact_logits, 0.08)
    assert_tree_close(new, exact_new, 0.08)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(exact_grads))
    assert_tree_close(grads, exact_grads, 0.08, floor=lambda path: largest / 4)
    # And it did compute in fewer bits.
    assert np.abs(np.asarray(logits, np.float32) - exact_logits).max() > 1e-4


@pytest.mark.parametrize("kind", ["spinal", "mlp", "dense"])
def test_bfloat16_compute_in_the_baselines(kind):
    make, attributes = ALL_HEADS[kind]
    head = make(**attributes | ({} if kind == "dense" else {"norm": "batch"}), dropout_rate=0.0)
    variables = random_variables(head, 24, np.random.default_rng(0))
    features = jnp.asarray(np.random.default_rng(1).standard_normal((64, 24)), jnp.float32)
    grads, (logits, _) = gradient_and_logits(head.clone(dtype=jnp.bfloat16), variables, features, KEY)
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert_tree_close(logits.astype(jnp.float32), apply(head, variables, features, train=True), 0.08)
