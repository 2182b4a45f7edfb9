"""What the heads refuse, and what they say."""

import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads_support import (
    ALL_HEADS,
    KEY,
    every_implementation,
    head_params,
    pack,
    random_variables,
    without,
)

from pspinal_jax import (
    ProgressiveSpinalHead,
    SpinalHead,
    pack_params,
)
from pspinal_jax.heads.layouts import convert_params

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
    ("norm", "layer", "norm must be one of None, 'none', 'batch', got 'layer'"),
    ("norm", True, "norm must be one of None, 'none', 'batch', got True"),
    ("implementation", "loop", "implementation must be one of 'auto', 'unrolled', 'fused', 'scan', got 'loop'"),
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


@every_implementation
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


@every_implementation
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


@every_implementation
@pytest.mark.parametrize(
    ("batch_stats", "named"),
    [
        ({}, r"layer_1/norm/mean is None, expected \(3,\)"),
        ({"layer_1": {"norm": {"mean": np.zeros(4), "var": np.ones(3)}}}, r"layer_1/norm/mean is \(4,\)"),
        ({"layer_5": {"norm": {"mean": np.zeros(3), "var": np.ones(3)}}}, "layer_5/norm/mean does not belong there"),
    ],
)
def test_fused_variables_with_other_statistics_are_refused(implementation, batch_stats, named):
    head = ProgressiveSpinalHead(4, 3, norm="batch", implementation=implementation)
    variables = random_variables(head, 8, np.random.default_rng(0))
    if batch_stats:
        batch_stats = {**variables["batch_stats"], **batch_stats}
    fused = {"params": convert_params(variables["params"], "fused"), "batch_stats": batch_stats}
    with pytest.raises(ValueError, match=f"fused variables do not fit this head: .*{named}"):
        head.apply(fused, jnp.zeros((2, 8)), train=False)


@pytest.mark.parametrize("kind", ALL_HEADS)
def test_float64_features_are_taken_as_float32_without_x64(kind):
    # What NumPy makes by default.
    head, attributes = ALL_HEADS[kind]
    logits, _ = call(head(**attributes), np.zeros((2, 8)))
    assert logits.dtype == jnp.float32
