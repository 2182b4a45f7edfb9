"""In every framework: the linen head's logits, gradients and new statistics, with dropout from the same key."""

import jax
import jax.numpy as jnp
import pytest
from interop_support import COMPILE_FAST, assert_close, linen_training, make_case, objective

KEY = jax.random.key(7)
CASES = {
    "plain": {"dropout_rate": 0.0},
    "dropout and norm": {"dropout_rate": 0.3, "layer_dropout_rate": 0.2, "norm": "batch"},
}


def options_of(head):
    names = ("num_layers", "dropout_rate", "layer_dropout_rate", "norm")
    return {name: getattr(head, name) for name in names}


def jit(function, **options):
    return jax.jit(function, compiler_options=COMPILE_FAST, **options)


def functional(head, variables):
    from pspinal_jax.interop.functional import progressive_head

    _, apply = progressive_head(3, 4, **options_of(head))
    stats = variables.get("batch_stats", {})

    def training(features, key):
        def loss(params, features):
            logits, new_stats = apply(params, stats, features, train=True, key=key)
            return objective(logits), (logits, new_stats)

        grads, (logits, new_stats) = jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], features)
        return logits, grads, new_stats

    return lambda features: apply(variables["params"], stats, features, train=False)[0], training, variables


def in_nnx(head, variables):
    from flax import nnx

    from pspinal_jax.interop.nnx import ProgressiveSpinalHead, load_linen, to_linen

    module = ProgressiveSpinalHead(5, 3, 4, rngs=nnx.Rngs(1), **options_of(head))
    load_linen(module, variables)

    def evaluate(features):
        module.eval()
        return module(features)

    def training(features, key):
        def loss(params, rest, features):  # in parts: nnx's tree mode differentiates by all variables of a module
            module = nnx.merge(graph, params, rest, copy=True)
            logits = module(features, rngs=key)
            return objective(logits), (logits, to_linen(module).get("batch_stats", {}))

        module.train()
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        grad = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
        (grads, grad_features), (logits, new_stats) = grad(params, rest, features)
        return logits, (dict(nnx.to_pure_dict(grads)), grad_features), new_stats

    return evaluate, training, to_linen(module)


def in_equinox(head, variables):
    eqx = pytest.importorskip("equinox")
    from pspinal_jax.interop.equinox import ProgressiveSpinalHead, load_linen, to_linen

    make = eqx.nn.make_with_state(ProgressiveSpinalHead)
    module, state = load_linen(*make(5, 3, 4, key=jax.random.key(1), **options_of(head)), variables)

    def training(features, key):
        def loss(arguments):
            module, features = arguments
            logits, new = module(features, state, key=key)
            return objective(logits), (logits, new)

        run = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))
        (grads, grad_features), (logits, new) = run((module, features))
        return logits, (grads.params, grad_features), to_linen(module, new).get("batch_stats", {})

    return lambda features: eqx.nn.inference_mode(module)(features, state)[0], training, to_linen(module, state)


def in_haiku(head, variables):
    hk = pytest.importorskip("haiku")
    from pspinal_jax.interop.haiku import ProgressiveSpinalHead, load_linen, to_linen

    @hk.transform_with_state
    def network(features, is_training):
        return ProgressiveSpinalHead(3, 4, name="head", **options_of(head))(features, is_training)

    fresh = jit(network.init, static_argnums=2)(jax.random.key(1), jnp.zeros((2, 5)), False)
    params, state = load_linen(*fresh, variables, name="head")

    def training(features, key):
        def loss(params, features):
            logits, new_state = network.apply(params, state, key, features, True)
            return objective(logits), (logits, new_state)

        (grads, grad_features), (logits, new) = jit(jax.grad(loss, (0, 1), has_aux=True))(params, features)
        new_stats = to_linen(params, new, "head").get("batch_stats", {})
        return logits, (to_linen(grads, {}, "head")["params"], grad_features), new_stats

    evaluate = lambda features: network.apply(params, state, None, features, False)[0]  # noqa: E731
    return evaluate, training, to_linen(params, state, "head")


PORTS = {"functional": functional, "nnx": in_nnx, "equinox": in_equinox, "haiku": in_haiku}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PORTS)
def test_equals_linen(name, case):
    head, variables, features = make_case(**CASES[case])
    evaluate, training, taken_back = PORTS[name](head, variables)
    assert_close(taken_back, variables)
    assert_close(evaluate(features), head.apply(variables, features, train=False))
    expected = linen_training(head, variables, features, haiku_key() if name == "haiku" else KEY)
    actual = training(features, KEY)
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want)
    assert bool(actual[2]) == (case != "plain")


def haiku_key():
    """The first key that a Haiku network draws from the one it is given."""
    import haiku as hk

    return hk.transform(hk.next_rng_key).apply({}, KEY)
