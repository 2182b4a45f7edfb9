"""ONNX models: what the writer makes of a function, computed by ONNX Runtime, is what JAX computes."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from PIL import Image

from pspinal_jax.data.images.decode import decode
from pspinal_jax.environment import convolving_by_library
from pspinal_jax.errors import RunError
from pspinal_jax.models import abstract_variables, build_model
from pspinal_jax.recipes import ModelConfig, load_recipe
from pspinal_jax.runs.onnx_model import run_onnx, write_onnx

PAGE = Path(__file__).parents[2] / "docs" / "examples" / "classify.html"
BROWSER = """
const given = JSON.parse(require("fs").readFileSync(0));
const ort = {
  InferenceSession: {create: async () => ({run: async ({images}) => ({probabilities: images, scores: {data: [0.4]}})})},
  Tensor: class { constructor(dtype, data, shape) { Object.assign(this, {dtype, data, shape}) } },
};
const document = {querySelector: () => ({})}, createImageBitmap = async file => file;
globalThis.fetch = async () => ({json: async () => given.about});
class OffscreenCanvas {
  constructor(width, height) { Object.assign(this, {width, height}) }
  getContext() { return {fillRect() {}, drawImage(image) { this.data = image.data }, getImageData() { return this }} }
}
"""
"""What the page asks of a browser and of ONNX Runtime; the model here gives its input back."""

FUNCTIONS = {
    "activations": lambda x: jax.nn.gelu(x) + jax.nn.silu(x) * jax.nn.softplus(x) - jnp.tanh(x) / (2 + jnp.sin(x)),
    "approximate gelu": lambda x: (
        jax.nn.gelu(x, approximate=False) + jax.nn.elu(x) + jax.checkpoint(jax.nn.hard_swish)(x)
    ),
    "choices": lambda x: (
        jnp.where(x > 0, jnp.sqrt(jnp.abs(x)), jnp.clip(x, -0.5, 0.5)) + jnp.sign(x) * (x != 0) * jax.lax.rsqrt(2 + x)
    ),
    "bounds": lambda x: jax.nn.relu6(x) + jnp.minimum(jnp.maximum(0.0, x), 6) + jnp.maximum(x, -x),
    "norms": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True) + jax.nn.logsumexp(x, -1, keepdims=True) ** 3,
    "columns": lambda x: jnp.concatenate([x[:, 1::2], x[:, :1], jnp.ones_like(x[:, :2]), x[:, None, 3]], 1).max(1),
    "constants": lambda x: jnp.stack([jnp.array([0.0, 1.0, 2.0]) + jnp.zeros((len(x), 1)), x[:, :3]], 1).sum(2),
    "products": lambda x: jnp.einsum("ni,nj->nij", x, x).reshape(len(x), -1) @ jnp.full((36, 2), 0.1),
    "transposes": lambda x: (jnp.array(np.eye(6, 4, dtype=np.float32)).T @ x.T).T.min(1),
    "padding": lambda x: (
        jnp.pad(x, ((0, 0), (2, 1)), constant_values=3.0) * jax.lax.stop_gradient(jnp.log1p(jnp.expm1(2.0)))
    ),
    "maps": lambda x: jax.lax.conv_general_dilated(
        *(x.reshape(-1, 2, 3, 1), jnp.array([[[[0.3, -1.0]], [[0.7, 0.2]]]]), (1, 2), ((1, 0), (2, 1))),
        rhs_dilation=(1, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    "differences": lambda x: (x - 0.7)[:, None] * jnp.array([[1.0], [-2.0]]) - jnp.ones(6),
    "not finite": lambda x: sum(jnp.where(jnp.isfinite(jnp.log(y)), x, 0.0) for y in (x, jax.nn.relu(x))),
}


def written(path, function, variables, example):
    write_onnx(path, lambda *args: {"found": function(*args)}, variables, example, {"name": "value"})
    return path


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gives_what_jax_gives_for_any_batch_size(name, tmp_path):
    def function(_, x):
        return FUNCTIONS[name](x)

    path = written(tmp_path / "model.onnx", function, {}, jax.ShapeDtypeStruct((6,), np.float32))
    rows = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    for size in (1, 5):
        expected = function({}, rows[:size])
        found = run_onnx(path, [rows[:size]])["found"]
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_the_file_says_what_goes_in_and_comes_out(tmp_path):
    path = written(
        tmp_path / "model.onnx",
        lambda v, x: x.astype(jnp.float32).sum(1) * v["a"],
        {"a": np.float32(2)},
        jax.ShapeDtypeStruct((2, 3), np.uint8),
    )
    model = onnx.load(path)
    (inputs,), (outputs,) = model.graph.input, model.graph.output
    sides = [side.dim_param or side.dim_value for side in inputs.type.tensor_type.shape.dim]
    assert (inputs.name, sides, outputs.name) == ("images", ["N", 2, 3], "found")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)] and model.ir_version == 8
    assert {entry.key: entry.value for entry in model.metadata_props} == {"name": "value"}


@pytest.mark.parametrize(
    "function",
    [
        lambda v, x: jnp.sort(x),
        lambda v, x: jax.lax.fori_loop(0, 3, lambda i, y: y * 2, x),
        lambda v, x: jnp.cumsum(x, 1),
    ],
    ids=["sort", "loop", "cumsum"],
)
def test_what_is_not_in_the_table_is_named(function, tmp_path):
    with pytest.raises(RunError, match=r"computes with (sort|scan|while|cumsum), which the ONNX writer does not know"):
        written(tmp_path / "model.onnx", function, {}, jax.ShapeDtypeStruct((6,), np.float32))
    assert not list(tmp_path.iterdir())


def random_like(shapes, gain):
    """Variables under which features and probabilities differ from row to row."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, np.sqrt(gain / np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"head": "progressive", "norm": "batch"}, (5, 5, 1)),
        ({"head": "progressive", "num_layers": 70, "layer_width": 2, "implementation": "unrolled"}, (7,)),
        ({"head": "spinal", "norm": "batch"}, (7,)),
        ({"head": "mlp"}, (5, 5, 1)),
        ({"head": "dense"}, (7,)),
        ({"backbone": "vgg5"}, (28, 28, 1)),
        ({"backbone": "resnet18"}, (97, 96, 3)),
        ({"backbone": "efficientnet_lite0"}, (32, 35, 3)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_every_backbone_and_head(settings, shape, tmp_path, tiny_resnet):
    small = {"layer_width": 4, "num_layers": 3} if settings.get("head") != "dense" else {}
    recipe = dataclasses.replace(load_recipe("digits"), model=ModelConfig(**(small | settings)))
    model = build_model(recipe, shape, 3)
    dtype = np.uint8 if len(shape) == 3 else np.float32
    variables = random_like(
        abstract_variables(model, shape, dtype), 2 if "efficientnet_lite0" in settings.values() else 1
    )
    rng = np.random.default_rng(1)
    inputs = (rng.integers(0, 256, (4, *shape)) if dtype == np.uint8 else rng.normal(size=(4, *shape))).astype(dtype)

    def function(variables, inputs):
        return jax.nn.softmax(model.apply(variables, inputs, train=False))

    with convolving_by_library():
        path = written(tmp_path / "model.onnx", function, variables, jax.ShapeDtypeStruct(shape, dtype))
    expected = np.asarray(jax.jit(function)(variables, inputs))
    assert np.ptp(expected, axis=0).max() > 1e-3, "the rows must differ for a comparison to mean anything"
    np.testing.assert_allclose(run_onnx(path, [inputs[:1], inputs[1:]])["found"], expected, rtol=0, atol=1e-5)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("Transpose") <= 4, "between convolutions, maps stay as ONNX has them"
    assert "BatchNormalization" not in kinds and kinds.count("Mul") < 9


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize(
    ("fit", "channels", "sides"),
    [("squash", 3, (61, 40)), ("squash", 3, (61, 9)), ("crop", 3, (61, 40)), ("pad", 3, (9, 33)), (None, 1, (61, 40))],
)
def test_the_page_resizes_as_python_does(fit, channels, sides):
    pixels = np.random.default_rng(0).integers(0, 256, (*sides, 3), np.uint8)
    height, width = 24, 17
    expected = decode(Image.fromarray(pixels), (height, width), fit or "squash")
    if channels == 1:
        expected = np.asarray(Image.fromarray(expected).convert("L"))
    rgba = np.concatenate([pixels, np.full((*sides, 1), 255, np.uint8)], 2)
    about = {"input": {"shape": ["N", height, width, channels], "fit": fit}, "class_names": list(range(expected.size))}
    given = {"about": about, "width": sides[1], "height": sides[0], "data": rgba.ravel().tolist()}
    (script,) = re.findall(r"<script>\n(.*?)</script>", PAGE.read_text(), re.DOTALL)
    script = BROWSER + script + "\nclassify(given).then(answer => console.log(JSON.stringify(answer)));"
    done = subprocess.run(["node", "-e", script], input=json.dumps(given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["known"] is True  # without a threshold
    rows = answer["classes"]
    assert [value for _, value in rows] == sorted((value for _, value in rows), reverse=True)
    found = np.array([value for _, value in sorted(rows)]).reshape(expected.shape)
    # Columns first, then rows, each rounded, as Pillow does but for shapes of which Pillow 13 takes the rows first.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if sides == (61, 40) else 1)
