"""What the scan form is for: a program that does not grow with L, and a backward pass that keeps one buffer."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from heads_support import abstract_variables

from pspinal_jax import ProgressiveSpinalHead, pack_batch_stats, pack_params

KINDS = {
    "plain": {},
    "norm": {"norm": "batch"},
    "masks": {"layer_dropout_rate": 0.5},
    "norm and masks": {"norm": "batch", "layer_dropout_rate": 0.5},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
ROWS, FEATURES, WIDTH = 4096, 8, 16


def abstract_call(implementation, num_layers, rows=ROWS, **attributes):
    """(apply, (packed params, packed stats, features, key)) of a head, the latter as shapes: nothing is computed."""
    head = ProgressiveSpinalHead(10, WIDTH, num_layers, implementation=implementation, **attributes)
    variables = abstract_variables(head, FEATURES)
    params = jax.eval_shape(pack_params, variables["params"])
    stats = jax.eval_shape(pack_batch_stats, variables.get("batch_stats", {}))
    features = jax.ShapeDtypeStruct((rows, FEATURES), jnp.float32)

    def call(params, stats, features, key):
        variables = {"params": params, "batch_stats": stats}
        return head.apply(variables, features, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

    return call, (params, stats, features, jax.eval_shape(lambda: jax.random.key(0)))


def gradient(call):
    def loss(*arguments):
        logits, new = call(*arguments)
        return (logits**2).sum(), new

    return jax.value_and_grad(loss, has_aux=True)


def program(implementation, num_layers, **attributes):
    call, arguments = abstract_call(implementation, num_layers, **attributes)
    return jax.jit(gradient(call)).lower(*arguments).as_text()


@every_kind
def test_the_program_of_scan_does_not_grow_with_the_layers(kind):
    few, many = (program("scan", num_layers, **KINDS[kind]) for num_layers in (4, 64))
    assert many.count("\n") == few.count("\n")
    # The numbers in the text grow by a digit or two.
    assert len(many) < 1.1 * len(few)


def test_the_program_of_unrolled_grows_with_the_layers():
    # So the measure above does see growth.
    few, many = (program("unrolled", num_layers) for num_layers in (4, 16))
    assert len(many) > 2 * len(few)


def buffers(num_layers, size):
    """A size in units of the buffer [N, L W], both counted in entries."""
    return size / (ROWS * num_layers * WIDTH)


def kernels(num_layers):
    return num_layers * num_layers * WIDTH * WIDTH


def kept_for_the_backward_pass(implementation, num_layers, **attributes):
    """Entries of all arrays that the forward pass hands to the backward pass."""
    call, arguments = abstract_call(implementation, num_layers, **attributes)
    params, stats, features, key = arguments

    def pullback(params, features, stats, key):
        return jax.vjp(lambda p, x: call(p, stats, x, key)[0], params, features)[1]

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback, params, features, stats, key)))


@every_kind
@pytest.mark.parametrize("num_layers", [16, 64])
def test_scan_keeps_one_buffer_for_the_backward_pass(kind, num_layers):
    size = kept_for_the_backward_pass("scan", num_layers, **KINDS[kind])
    # The pre-activations and the buffer that the output's product needs; with masks, that buffer's mask as well.
    limit = 5 if "layer_dropout_rate" in KINDS[kind] else 3
    assert buffers(num_layers, size - kernels(num_layers)) < limit


def naive_loss(params, features):
    """The same scan, left to automatic differentiation."""
    num_layers, hidden_width, width = params["hidden_kernel"].shape
    of_features = (features @ params["features_kernel"])[:, : hidden_width - width]
    later = of_features.reshape(len(features), num_layers - 1, width).transpose(1, 0, 2)
    offsets = jnp.concatenate([(features @ params["first_kernel"])[None], later]) + params["hidden_bias"][:, None]

    def step(buffer, layer):
        index, offset, kernel = layer
        hidden = jax.nn.relu(offset + buffer @ kernel)
        return jax.lax.dynamic_update_slice(buffer, hidden, (0, index * width)), None

    layers = (jnp.arange(num_layers), offsets, params["hidden_kernel"])
    buffer, _ = jax.lax.scan(step, jnp.zeros((len(features), hidden_width)), layers)
    return (buffer @ params["output_kernel"]).sum()


def compiled_buffers(function, arguments, num_layers):
    """What the compiled program allocates beside its arguments and results, less two sets of kernels."""
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return buffers(num_layers, memory.temp_size_in_bytes / 4 - 2 * kernels(num_layers))


@pytest.mark.parametrize("kind", ["plain", "norm", "masks"])
def test_the_compiled_gradient_of_scan_takes_a_few_buffers(kind):
    call, arguments = abstract_call("scan", 64, **KINDS[kind])
    assert compiled_buffers(gradient(call), arguments, 64) < 12


def test_differentiating_a_plain_scan_would_take_a_buffer_for_each_layer():
    # So the measures above do see what they are there for.
    params, _, features, _ = abstract_call("scan", 64)[1]
    kept = jax.eval_shape(lambda *arguments: jax.vjp(naive_loss, *arguments)[1], params, features)
    assert buffers(64, sum(leaf.size for leaf in jax.tree.leaves(kept))) > 64
    assert compiled_buffers(jax.grad(naive_loss), (params, features), 64) > 64


IMPORTED = """
import sys
import pspinal_jax
assert "jax" not in sys.modules, "importing the package alone should cost nothing"
pspinal_jax.ProgressiveSpinalHead
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_the_head_imports_no_more_than_jax_and_flax():
    run = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    imported = set(run.stdout.split())
    assert {"jax", "flax"} <= imported
    unwanted = {
        "tensorflow", "tensorflow_datasets", "torch", "grain", "array_record", "sklearn", "matplotlib", "PIL", "tyro",
    }  # fmt: skip
    assert not imported & unwanted
    # orbax, flax's own dependency, is a namespace package: its parts are what must not be there.
    assert "orbax" not in imported
