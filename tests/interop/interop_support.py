"""A head's variables and its gradients, as linen computes them and as each framework does in its own way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax import ProgressiveSpinalHead

NUM_FEATURES, ROWS = 5, 8
COMPILE_FAST = {"xla_backend_optimization_level": 0}


@functools.lru_cache
def make_case(**options):
    """A linen head, its variables with every entry drawn, and features."""
    head = ProgressiveSpinalHead(3, 4, num_layers=2, **options)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda x: head.init(jax.random.key(0), x, train=False), jnp.zeros((2, NUM_FEATURES)))
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), shapes)
    variables["params"] = jax.tree.map(lambda leaf: leaf - 1.1, variables["params"])
    return head, variables, jnp.asarray(rng.standard_normal((ROWS, NUM_FEATURES)), jnp.float32)


def objective(logits):
    """A scalar that weighs every logit differently."""
    return jnp.sum(jnp.sin(logits) * jnp.arange(1, logits.size + 1).reshape(logits.shape))


def linen_training(head, variables, features, key):
    """(logits, gradients of params and of features, new batch_stats) of one training batch."""

    def loss(params, features):
        given = {**variables, "params": params}
        logits, new = head.apply(given, features, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        return objective(logits), (logits, dict(new.get("batch_stats", {})))

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=COMPILE_FAST)
    grads, (logits, new_stats) = run(variables["params"], features)
    return logits, grads, new_stats


def assert_close(actual, expected):
    """The same tree, every tensor within 1e-6 of its largest entry.

    A bias before a norm has no gradient but rounding: nothing is asked to be closer than a hundredth of that, taken of
    the tree's largest entry.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    largest = max((np.abs(leaf).max() for leaf in jax.tree.leaves(expected)), default=1.0)
    assert largest > 0
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        assert got.dtype == want.dtype
        scale = max(np.abs(want).max(), 0.01 * largest)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * scale, err_msg=jax.tree_util.keystr(path))
