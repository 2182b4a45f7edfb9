"""oneDNN's convolutions on CPU: asked for where they are known and take effect, by programs with convolutions alone."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspinal_jax import environment
from pspinal_jax.environment import CONVOLUTIONS_SWITCH, LOOPS_SWITCH, convolution_options, jit_with, loop_options
from pspinal_jax.layers.conv import conv_same
from pspinal_jax.layers.depthwise import depthwise_conv
from pspinal_jax.models import build_model
from pspinal_jax.recipes import load_recipe
from pspinal_jax.runs import build

UNKNOWN = {"no_such_option_of_xla": True}
KNOWN = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)


@pytest.fixture
def fresh():
    environment._has_onednn.cache_clear()
    yield
    environment._has_onednn.cache_clear()


def test_convolution_options_are_found_from_jax_0_11_on_and_only_on_cpu(monkeypatch, fresh, optimised):
    assert bool(convolution_options("cpu")) == KNOWN
    assert convolution_options("cuda") == convolution_options("tpu") == {}
    monkeypatch.setenv(CONVOLUTIONS_SWITCH, "off")
    assert convolution_options("cpu") == {}


def test_options_that_are_not_known_are_not_asked_for(monkeypatch, fresh, optimised):
    monkeypatch.setattr(environment, "_ONEDNN", UNKNOWN)
    assert convolution_options("cpu") == {}


def test_options_without_effect_are_not_asked_for(monkeypatch, fresh, optimised):
    monkeypatch.setattr(environment, "_ONEDNN", {"xla_cpu_enable_fast_math": False})
    assert convolution_options("cpu") == {}


@pytest.mark.parametrize(("backbone", "reached"), [pytest.param("vgg5", True, marks=pytest.mark.slow), ("none", False)])
def test_they_reach_the_programs_with_convolutions_and_no_others(monkeypatch, backbone, reached):
    monkeypatch.setattr(build, "convolution_options", lambda platform: UNKNOWN)
    recipe = load_recipe("mnist")
    recipe = dataclasses.replace(
        recipe, batch_size=2, eval_batch_size=2, model=dataclasses.replace(recipe.model, backbone=backbone)
    )
    shape = (28, 28, 1)
    built = build.build_run_programs(recipe, build_model(recipe, shape, 10), shape, np.uint8)
    state = built.init(np.uint32(0))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    data = np.zeros((2, *shape), np.uint8), np.zeros(2, np.int32)
    calls = (
        lambda: built.evaluate(variables, data, np.int32(2)),
        lambda: built.batch_step(state, built.zero_totals(np.uint32(0)), np.uint32(0), np.float32(0), data),
    )
    for call in calls:
        if reached:
            with pytest.raises(Exception, match="no_such_option_of_xla"):
                call()
        else:
            call()


@pytest.mark.skipif(not KNOWN, reason="oneDNN's convolutions came with jax 0.11")
@pytest.mark.parametrize("stride", [1, 2])
def test_they_compute_the_same(stride, optimised, fresh):
    rng = np.random.default_rng(0)
    images, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 9, 9, 16), (3, 3, 16, 32)))

    def loss(images, kernel):
        return (conv_same(images, kernel, stride) ** 2).sum()

    def gradients(**options):
        return jit_with(options, jax.value_and_grad(loss, (0, 1)))

    onednn, plain = gradients(**convolution_options("cpu")), gradients()
    assert isinstance(onednn, environment._Uncached)  # JAX warns, an error here, where it cannot store it
    compare = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)
    jax.tree.map(compare, onednn(images, kernel), plain(images, kernel))


@pytest.mark.skipif(not KNOWN, reason="oneDNN's convolutions came with jax 0.11")
def test_a_depthwise_gradient_is_theirs_inside_a_loop(optimised, fresh):
    """Where XLA takes the turned kernel for a property of the convolution, it is a loop nest, 30 times as slow."""

    def step(_, carry):
        images, kernel = carry
        gradient = jax.grad(lambda images: (depthwise_conv(images, kernel) * 2.0).sum())(images)
        return images - gradient, kernel * 0.5

    def train(images, kernel):
        return jax.lax.fori_loop(0, 3, step, (images, kernel))

    program = jit_with(convolution_options("cpu"), train)
    lowered = program.lower(jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 1, 16)))
    with environment._kept_out_of_the_cache():
        text = lowered.compile().as_text()
    assert text.count("__onednn$convolution") == 1 and " convolution(" not in text


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device, as far as the options of loops ask for it."""
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 12090")
    monkeypatch.setattr(jax, "devices", lambda platform: [SimpleNamespace(client=client)])
    return client


def test_loops_become_graphs_where_the_switch_and_a_tiny_program_say_so(monkeypatch, cuda):
    proofs = []
    monkeypatch.setattr(environment, "_loops_run_as_graphs", lambda: proofs.append(1) or len(proofs) == 1)
    assert loop_options("gpu") == {} and not proofs  # off by default
    monkeypatch.setenv(LOOPS_SWITCH, "on")
    assert loop_options("cpu") == loop_options("tpu") == {} and not proofs
    assert "WHILE" in loop_options("gpu")["xla_gpu_enable_command_buffer"]
    assert loop_options("gpu") == {}  # the second proof failed
    cuda.platform_version = "rocm 60443484"
    assert loop_options("gpu") == {} and len(proofs) == 2


def test_a_proof_that_fails_or_crashes_is_none(monkeypatch):
    """The tiny program itself runs on any platform, which knows the option; crashing ends its own process alone."""
    prove = environment._loops_run_as_graphs.__wrapped__
    assert prove()
    for code in ("import os; os.abort()", "no_such_name"):
        monkeypatch.setattr(environment, "_PROOF", code)
        assert not prove()


def test_loops_as_graphs_are_kept_in_the_compilation_cache():
    program = jit_with(environment._LOOP_GRAPHS, lambda x: x + environment.library_convolves())
    assert not isinstance(program, environment._Uncached) and program(1) == 1
