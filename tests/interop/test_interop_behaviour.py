"""What each framework's users rely on beside equal numbers: modes, streams, names, refusals, optional imports."""

import importlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interop_support import COMPILE_FAST, assert_close, make_case

from pspinal_jax import ProgressiveSpinalHead, pack_batch_stats, pack_params
from pspinal_jax.interop.functional import apply_head, progressive_head
from pspinal_jax.interop.linen import HeadOptions
from pspinal_jax.interop.nnx import ProgressiveSpinalHead as NnxHead
from pspinal_jax.interop.nnx import load_linen, to_linen
from pspinal_jax.layers.dropout import FEATURES_STREAM, dropout_scale

ALL_OPTIONS = {
    "num_layers": 3,
    "dropout_rate": 0.1,
    "layer_dropout_rate": 0.4,
    "norm": "batch",
    "activation": jnp.tanh,
    "implementation": "scan",
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.float16,
    "kernel_init": nn.initializers.ones,
    "bias_init": nn.initializers.zeros,
}
KEY = jax.random.key(3)


def test_importing_the_package_imports_no_framework():
    code = "import sys, pspinal_jax.interop; print({'jax', 'flax', 'equinox', 'haiku'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(("module", "package"), [("equinox", "Equinox"), ("haiku", "dm-haiku")])
def test_a_missing_package_is_named_with_its_extra(module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"pspinal_jax.interop.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"needs {package}, which is not installed; .*'\.\[{module}\]'"):
        importlib.import_module(f"pspinal_jax.interop.{module}")


def test_the_options_are_the_linen_heads():
    fields = [name for name in ProgressiveSpinalHead.__dataclass_fields__ if name not in ("parent", "name")]
    assert fields == ["num_classes", "layer_width", *HeadOptions.__annotations__]
    assert set(ALL_OPTIONS) == set(HeadOptions.__annotations__)
    defaults = ProgressiveSpinalHead(3, 4)
    assert all(getattr(defaults, name) is not value for name, value in ALL_OPTIONS.items())


@pytest.mark.parametrize("framework", ["nnx", "equinox", "haiku"])
def test_every_option_reaches_the_head(framework):
    if framework == "nnx":
        head = nnx.eval_shape(lambda: NnxHead(5, 3, 4, rngs=nnx.Rngs(0), **ALL_OPTIONS)).head
    elif framework == "equinox":
        eqx = pytest.importorskip("equinox")
        module = importlib.import_module("pspinal_jax.interop.equinox")
        head = eqx.filter_eval_shape(module.ProgressiveSpinalHead, 5, 3, 4, key=KEY, **ALL_OPTIONS).head
    else:
        hk = pytest.importorskip("haiku")
        module = importlib.import_module("pspinal_jax.interop.haiku")
        seen = []
        network = hk.transform(lambda: seen.append(module.ProgressiveSpinalHead(3, 4, **ALL_OPTIONS).head))
        network.init(KEY)
        head = seen[0]
    assert head == ProgressiveSpinalHead(3, 4, **ALL_OPTIONS)


def test_the_same_key_draws_the_same_parameters():
    head = ProgressiveSpinalHead(3, 4, num_layers=1, norm="batch")
    init_linen = jax.jit(lambda key: head.init(key, jnp.ones((8, 5)), train=False), compiler_options=COMPILE_FAST)
    expected = init_linen(KEY)
    init, _ = progressive_head(3, 4, num_layers=1, norm="batch")
    params, batch_stats = init(KEY, 5)
    assert_close(params, expected["params"])
    assert_close(batch_stats, expected["batch_stats"])


def test_dropout_without_a_key_is_refused():
    head, variables, features = make_case(norm="batch")
    arguments = (head, variables["params"], variables["batch_stats"], features)
    with pytest.raises(ValueError, match="dropout in training needs a key, got None"):
        apply_head(*arguments, train=True)
    _, batch_stats = apply_head(*arguments, train=False)
    assert batch_stats is variables["batch_stats"]


@pytest.fixture(scope="module")
def trained_nnx():
    """An nnx head with drawn variables, and its four modes by (deterministic, use_running_average)."""
    head, variables, features = make_case(norm="batch", dropout_rate=0.5)
    module = NnxHead(5, 3, 4, rngs=nnx.Rngs(0), num_layers=2, norm="batch", dropout_rate=0.5)
    load_linen(module, variables)
    return head, variables, features, module


def test_nnx_modes(trained_nnx):
    head, variables, features, module = trained_nnx
    without = head.clone(dropout_rate=0.0)
    evaluated = head.apply(variables, features, train=False)
    normalised, new = without.apply(variables, features, train=True, mutable=["batch_stats"])

    module.eval()
    assert module.deterministic and module.use_running_average
    assert_close(module(features), evaluated)
    module.train()
    assert not module.deterministic and not module.use_running_average
    assert_close(module(features, deterministic=True), normalised)
    assert_close(to_linen(module)["batch_stats"], new["batch_stats"])
    load_linen(module, variables)

    frozen = module(features, use_running_average=True, rngs=KEY)
    assert_close(to_linen(module), variables)
    assert not np.allclose(frozen, evaluated)
    viewed = nnx.view(module, deterministic=True, use_running_average=True)
    assert_close(viewed(features), evaluated)
    assert not module.deterministic


def test_dropout_on_running_statistics_follows_the_equations(trained_nnx):
    _, variables, features, module = trained_nnx
    params, running = jax.tree.map(np.asarray, (variables["params"], variables["batch_stats"]))
    u = features * dropout_scale(KEY, FEATURES_STREAM, 0.5, features.shape, jnp.float32)
    inputs, outputs = np.asarray(features), [np.asarray(u)]
    for name in ("layer_1", "layer_2"):
        pre = inputs @ params[name]["kernel"] + params[name]["bias"]
        pre = (pre - running[name]["norm"]["mean"]) / np.sqrt(running[name]["norm"]["var"] + 1e-5)
        outputs.append(np.maximum(pre * params[name]["norm"]["scale"] + params[name]["norm"]["bias"], 0))
        inputs = np.concatenate(outputs, axis=1)
    logits = inputs @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(module(features, use_running_average=True, rngs=KEY), logits, rtol=1e-5, atol=1e-5)


def test_nnx_draws_new_masks_at_every_call_from_its_own_stream(trained_nnx):
    _, _, features, module = trained_nnx
    first = module(features, deterministic=False, use_running_average=True)
    assert not np.allclose(first, module(features, deterministic=False, use_running_average=True))
    module.rngs = nnx.data(None)
    with pytest.raises(ValueError, match="dropout needs rngs, got None"):
        module(features)


def test_variables_of_another_head_are_refused_with_every_difference():
    _, variables, _ = make_case(norm="batch")
    module = nnx.eval_shape(lambda: NnxHead(6, 3, 4, rngs=nnx.Rngs(0), num_layers=2))
    with pytest.raises(ValueError) as caught:
        load_linen(module, variables)
    for difference in ("layer_1/kernel is [5, 4], expected [6, 4]", "layer_1/norm/bias is [4], expected nothing"):
        assert difference in str(caught.value)
    with pytest.raises(ValueError, match="variables have layer_1, layer_2, output, expected params"):
        load_linen(module, variables["params"])


def test_packed_variables_are_taken_too(trained_nnx):
    _, variables, _, module = trained_nnx
    packed = {"params": pack_params(variables["params"]), "batch_stats": pack_batch_stats(variables["batch_stats"])}
    nnx.update(module, jax.tree.map(jnp.zeros_like, variables["params"]))
    load_linen(module, packed)
    assert_close(to_linen(module), variables)


def test_in_haiku_one_module_called_twice_has_one_set_of_parameters():
    hk = pytest.importorskip("haiku")
    haiku = importlib.import_module("pspinal_jax.interop.haiku")

    class Model(hk.Module):
        def __call__(self, features):
            head = haiku.ProgressiveSpinalHead(3, 4, num_layers=1, norm="batch")
            return head(features, True), head(features, True)

    network = hk.transform_with_state(lambda features: Model()(features))
    params, state = jax.eval_shape(network.init, KEY, jnp.ones((4, 5)))
    assert list(params) == [f"model/progressive_spinal_head/{name}" for name in ("layer_1", "layer_1/norm", "output")]
    assert list(state) == ["model/progressive_spinal_head/layer_1/norm"]
    with pytest.raises(ValueError, match="no module 'head' in the parameters; there are: model/progressive"):
        haiku.to_linen(params, state, "head")


def test_in_equinox_batch_norm_under_vmap_is_refused():
    eqx = pytest.importorskip("equinox")
    module = importlib.import_module("pspinal_jax.interop.equinox")
    make = eqx.nn.make_with_state(module.ProgressiveSpinalHead)
    head, state = eqx.filter_eval_shape(make, 5, 3, 4, num_layers=1, norm="batch", dropout_rate=0.0, key=KEY)
    vmapped = jax.vmap(lambda row, state: head(row, state), in_axes=(0, None))
    with pytest.raises(ValueError, match="needs at least 2 rows"):
        eqx.filter_eval_shape(vmapped, jnp.ones((4, 5)), state)
