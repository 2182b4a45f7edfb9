"""What implementation='auto' picks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads_support import head_params, random_variables

from pspinal_jax import ProgressiveSpinalHead, fuse_params, pack_params
from pspinal_jax.heads.layouts import choose, training_layout


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def program_of(params, **attributes):
    head = ProgressiveSpinalHead(4, 3, **attributes)
    jaxpr = jax.make_jaxpr(lambda p: head.apply({"params": p}, jnp.ones((2, 8)), train=False))(params)
    return list(primitives(jaxpr.jaxpr))


def test_the_parameters_form_decides():
    tree = head_params()
    assert "scan" not in program_of(tree) and program_of(tree).count("dot_general") == 5
    assert "scan" not in program_of(fuse_params(tree)) and program_of(fuse_params(tree)).count("dot_general") == 6
    assert "scan" in program_of(pack_params(tree))


@pytest.mark.parametrize(("num_layers", "scanned"), [(63, False), (64, True)])
def test_deep_trees_are_scanned(num_layers, scanned):
    head = ProgressiveSpinalHead(4, 3, num_layers)
    features = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    variables = jax.eval_shape(lambda x: head.init(jax.random.key(0), x, train=False), features)
    jaxpr = jax.make_jaxpr(lambda v, x: head.apply(v, x, train=False))(variables, features)
    assert ("scan" in set(primitives(jaxpr.jaxpr))) == scanned


def test_an_implementation_asked_for_is_kept():
    for asked in ("unrolled", "fused", "scan"):
        assert all(choose(asked, form, 100) == asked for form in ("tree", "packed", "fused"))
    assert training_layout("unrolled", 100, 256, False) == "tree"
    assert training_layout("scan", 2, 256, False) == "packed"


def test_the_form_to_train_in():
    assert training_layout("auto", 4, 32, False) == "fused"
    assert training_layout("auto", 4, 31, False) == "tree"
    assert training_layout("auto", 4, 256, True) == "tree"
    assert training_layout("auto", 64, 16, True) == "packed"


def test_forms_hold_the_same_function():
    params = random_variables(ProgressiveSpinalHead(4, 3), 8, np.random.default_rng(0))["params"]
    head, features = ProgressiveSpinalHead(4, 3), jnp.ones((2, 8))
    expected = head.apply({"params": params}, features, train=False)
    for convert in (fuse_params, pack_params):
        np.testing.assert_allclose(head.apply({"params": convert(params)}, features, train=False), expected, rtol=1e-5)
