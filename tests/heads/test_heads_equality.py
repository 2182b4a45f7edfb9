"""The implementations are one function: logits, gradients and statistics of each, on each form of its variables."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads_support import COMPILE_FAST, assert_tree_close, random_variables
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pspinal_jax import ProgressiveSpinalHead
from pspinal_jax.heads.layouts import convert_batch_stats, convert_params


@dataclasses.dataclass(frozen=True)
class Case:
    num_features: int
    layer_width: int
    num_layers: int
    num_classes: int
    leading: tuple
    norm: str | None
    dropout_rate: float
    layer_dropout_rate: float
    train: bool
    implementation: str
    form: str
    activation: str = "relu"
    seed: int = 0

    def head(self, implementation, dtype):
        return ProgressiveSpinalHead(
            num_classes=self.num_classes,
            layer_width=self.layer_width,
            num_layers=self.num_layers,
            dropout_rate=self.dropout_rate,
            layer_dropout_rate=self.layer_dropout_rate,
            norm=self.norm,
            activation=getattr(jax.nn, self.activation),
            implementation=implementation,
            param_dtype=dtype,
        )


def cases(norm, mode, max_layers, leading, least_rows):
    """Any head and input; where batch norm learns, of at least so many rows.

    What hypothesis tries first, and returns to, are the first values: so these are no trivial ones.
    """
    among = st.sampled_from
    train = mode != "eval"
    case = st.builds(
        Case,
        num_features=among([5, *range(1, 13)]),
        layer_width=among([3, *range(1, 7)]),
        num_layers=among([3, 1, 2, 4, max_layers]),
        num_classes=among([4, *range(1, 8)]),
        leading=among([shape for shape in leading if not (norm and train) or math.prod(shape) >= least_rows]),
        norm=st.just(norm),
        dropout_rate=among([0.5, 0.2, 0.0]),
        layer_dropout_rate=st.just(0.0 if mode == "train" else 0.5),
        train=st.just(train),
        implementation=among(["scan", "fused", "unrolled"]),
        form=among(["packed", "fused", "tree"]),
        activation=among(["relu", "gelu"]),
        seed=st.integers(0, 2**16),
    )
    # 'unrolled' on the documented tree is what the others are compared with.
    return case.filter(lambda c: c.form != "tree" or c.implementation != "unrolled")


def gradient_function(head, train):
    """(gradients of params and features, logits, new batch statistics) as one compiled function."""

    def loss(params, features, stats, weights, key):
        logits, new = head.apply(
            {"params": params, **stats}, features, train=train, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return jnp.sum(weights * jnp.sin(logits)), (logits, new)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=COMPILE_FAST)


def check(case, dtype, tolerance):
    reference_head = case.head("unrolled", dtype)
    reference = gradient_function(reference_head, case.train)
    candidate = gradient_function(case.head(case.implementation, dtype), case.train)
    # Compiling is what takes the time: once compiled, try several draws.
    for seed in range(case.seed, case.seed + 3):
        rng = np.random.default_rng(seed)
        variables = random_variables(reference_head, case.num_features, rng, dtype)
        params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        features = jnp.asarray(rng.standard_normal((*case.leading, case.num_features)), dtype)
        weights = jnp.asarray(rng.standard_normal((*case.leading, case.num_classes)), dtype)
        key = jax.random.key(seed)

        (grads, grad_features), (logits, new) = reference(params, features, stats, weights, key)
        params, grads = (convert_params(tree, case.form) for tree in (params, grads))
        stats, new = ({name: convert_batch_stats(s, case.form) for name, s in tree.items()} for tree in (stats, new))
        (got_grads, got_grad_features), (got_logits, got_new) = candidate(params, features, stats, weights, key)

        assert logits.shape == (*case.leading, case.num_classes)
        assert ("batch_stats" in new) == (case.norm is not None)
        assert_tree_close(got_logits, logits, tolerance)
        assert_tree_close(got_new, new, tolerance)
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))

        def floor(path, largest=largest):
            # Batch norm takes a constant out again, so the gradient of the bias before it is rounding and no more.
            hidden_bias = path[-1].key in ("bias", "hidden_bias") and path[0].key != "output" and len(path) < 3
            return largest if case.norm and case.train and hidden_bias else 0.0

        assert_tree_close(got_grads, grads, tolerance, floor)
        assert_tree_close(got_grad_features, grad_features, tolerance)


def check_float64(case):
    with jax.enable_x64(True):
        check(case, jnp.float64, 1e-9)


def check_float32(case):
    # An accelerator may multiply in fewer bits than float32 has, unless told.
    with jax.default_matmul_precision("highest"):
        check(case, jnp.float32, 1e-5)


# No database and no fresh randomness: the suite gives one answer. No shrinking: it would compile for minutes.
FAST = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
FLOAT_64 = {"leading": [(2, 3), (), (1,), (2,), (7,), (3, 1, 2)], "least_rows": 2}
FLOAT_32 = {"leading": [(8,), (), (1,), (13,), (2, 5), (2, 1, 4)], "least_rows": 8}
with_norm = pytest.mark.parametrize("norm", [None, "batch"])
in_every_mode = pytest.mark.parametrize("mode", ["train", "train with layer dropout", "eval"])


@with_norm
@in_every_mode
@settings(FAST, max_examples=1)
@given(data=st.data())
def test_implementations_agree_in_float64(norm, mode, data):
    check_float64(data.draw(cases(norm, mode, 4, **FLOAT_64)))


ENDS = {
    "smallest": Case(1, 1, 1, 1, (), None, 0.5, 0.0, True, "scan", "packed"),
    "one layer": Case(4, 3, 1, 2, (8,), "batch", 0.2, 0.5, True, "scan", "packed"),
    "reference on packed": Case(4, 3, 2, 2, (8,), "batch", 0.2, 0.5, True, "unrolled", "packed"),
    "fused": Case(5, 3, 3, 4, (8,), None, 0.5, 0.0, True, "fused", "fused"),
    "fused with norm": Case(5, 3, 3, 4, (8,), "batch", 0.5, 0.0, True, "fused", "fused"),
    "fused with a mask per layer": Case(5, 3, 3, 4, (8,), "batch", 0.2, 0.5, True, "fused", "tree"),
    "deep": Case(8, 4, 16, 3, (8,), "batch", 0.2, 0.0, True, "scan", "packed"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("deep", "reference on packed", "fused with norm") else []
        )
        for name in ENDS
    ],
)
def test_implementations_agree_at_the_ends(name):
    check_float64(ENDS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_implementations_agree_at_the_ends_in_float32(name):
    check_float32(ENDS[name])


@pytest.mark.slow
@with_norm
@in_every_mode
@settings(FAST, max_examples=10)
@given(data=st.data())
def test_implementations_agree_in_float64_at_length(norm, mode, data):
    check_float64(data.draw(cases(norm, mode, 16, **FLOAT_64)))


@pytest.mark.slow
@with_norm
@in_every_mode
@settings(FAST, max_examples=10)
@given(data=st.data())
def test_implementations_agree_in_float32_at_length(norm, mode, data):
    check_float32(data.draw(cases(norm, mode, 16, **FLOAT_32)))
