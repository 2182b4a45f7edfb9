"""Computing in bfloat16 with float32 parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads_support import (
    ALL_HEADS,
    COMPILE_FAST,
    KEY,
    apply,
    assert_tree_close,
    every_implementation,
    pack,
    random_variables,
)

from pspinal_jax import (
    ProgressiveSpinalHead,
)


def gradient_and_logits(head, variables, features, key):
    def loss(params):
        logits, new = head.apply(
            variables | {"params": params}, features, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return jnp.mean(logits.astype(jnp.float32) ** 2), (logits, new)

    return jax.jit(jax.grad(loss, has_aux=True), compiler_options=COMPILE_FAST)(variables["params"])


@every_implementation
@pytest.mark.parametrize(
    ("norm", "layer_dropout_rate", "packed"),
    [(None, 0.0, False), pytest.param("batch", 0.5, True, marks=pytest.mark.slow)],
)
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
