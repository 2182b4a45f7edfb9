"""Runs, exports and parameter trees that an older commit wrote still open, and mean the same.

README.md tells how fixtures/ was made. Only interfaces that stay are used here: the command line, the names at the
package's top, pspinal_jax.weights, pspinal_jax.interop and jax.export.
"""

import importlib.metadata
import json
import os
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.interop import nnx as interop_nnx
from pspinal_jax.interop.functional import progressive_head
from pspinal_jax.training.costs import MEASURED
from pspinal_jax.weights import (
    classifier_state_dict,
    classifier_variables,
    read_variables,
    resnet_state_dict,
    resnet_variables,
    save_variables,
)

FIXTURES = Path(__file__).with_name("fixtures")
INIT_KEY, DROPOUT_KEY = 0, 1
TOLERANCE = 1e-6
"""Of one pass through a head: processors sum in different orders."""
TRAINED_TOLERANCE = 1e-3
"""Of the losses and accuracies of a training on another machine than the one that wrote the fixtures, where it is 0."""
BACKBONES = {
    "vgg5": (lambda tree: classifier_state_dict(tree, "vgg5"), lambda state: classifier_variables(state, "vgg5")),
    "resnet18": (lambda tree: resnet_state_dict(tree, "resnet18"), lambda state: resnet_variables(state, "resnet18")),
}


def machine():
    """What decides the last bit of a training."""
    traits = ("vendor_id", "cpu family", "model\t", "flags")
    about = Path("/proc/cpuinfo")
    lines = [line for line in about.read_text().splitlines() if line.startswith(traits)] if about.exists() else []
    return {
        "processor": zlib.crc32("\n".join(sorted(set(lines))).encode()),
        "cores": os.cpu_count(),
        "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy")},
    }


def timeless(value):
    """`value` without what differs from one run to the next, or from one machine to the next."""
    if isinstance(value, list):
        return [timeless(item) for item in value]
    if not isinstance(value, dict):
        return value
    measured = (*MEASURED, "costs", "device", "versions", "seeds_as")
    return {key: timeless(item) for key, item in value.items() if key not in measured}


def expected(*keys):
    value = json.loads((FIXTURES / "expected.json").read_text())
    for key in keys:
        value = value[key]
    return value


def read(path):
    return json.loads(path.read_text())


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_holds(actual, wanted, tolerance):
    """`actual` has all that `wanted` has, floats within `tolerance`; dicts may have come to hold more."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            assert_holds(actual[key], value, tolerance)
    elif isinstance(wanted, list):
        assert len(actual) == len(wanted)
        for one, other in zip(actual, wanted, strict=True):
            assert_holds(one, other, tolerance)
    elif isinstance(wanted, float):
        assert abs(actual - wanted) <= tolerance
    else:
        assert actual == wanted


def assert_trees(actual, wanted, tolerance=0.0):
    """The same names, shapes and dtypes; values within `tolerance` of 1 or the largest, for 0 bit for bit."""
    actual, wanted = flatten_dict(dict(actual), sep="/"), flatten_dict(dict(wanted), sep="/")
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        got = np.asarray(actual[name])
        assert got.shape == value.shape and got.dtype == value.dtype, name
        if tolerance:
            assert np.abs(got - value).max() <= tolerance * np.abs(value).max(initial=1.0), name
        else:
            assert got.tobytes() == value.tobytes(), name


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    """Compiling is what these tests wait for. The fixtures were made so too: it decides the last bit."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()  # they do not tell programs compiled the one way from those compiled the other
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture
def unpacked(tmp_path, monkeypatch, capsys):
    """Unpacks a run beside its data and changes to their folder; at the end no checkpoint was called damaged."""
    shutil.copy(FIXTURES / "digits.npz", tmp_path)
    monkeypatch.chdir(tmp_path)

    def unpack(run):
        shutil.unpack_archive(FIXTURES / f"{run}.zip", tmp_path)
        return tmp_path / run

    yield unpack
    assert "damaged" not in capsys.readouterr().err


@pytest.fixture
def images():
    with np.load(FIXTURES / "digits.npz") as arrays:
        return arrays["test_images"][:8, ..., None]


@pytest.fixture
def pictures(images, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[..., 0]).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def selected():
    return read_variables(FIXTURES / "selected.safetensors")


def selected_now(run, index):
    """The selected parameters, as an export of the run holds them."""
    assert main(["export", str(run), "--output", f"exported_{index}", "--seed-index", str(index)]) == 0
    return read_variables(Path(f"exported_{index}") / "params.safetensors")


def predicted(capsys, arguments):
    """Probabilities [N, C] of `predict`."""
    capsys.readouterr()
    assert main(["predict", *arguments, "--json", "--top", "10"]) == 0
    told = [{entry["class"]: entry["probability"] for entry in each["classes"]} for each in json.loads(_out(capsys))]
    return np.array([[each[str(label)] for label in range(10)] for each in told])


def _out(capsys):
    captured = capsys.readouterr()
    assert "damaged" not in captured.err
    return captured.out


def test_a_finished_run_is_known_and_evaluates_as_before(unpacked):
    run = unpacked("finished")
    written = {name: (run / name).read_bytes() for name in ("config.json", "metrics.jsonl", "result.json")}
    assert main(expected("runs", "finished", "command")) == 0
    assert {name: (run / name).read_bytes() for name in written} == written  # and so was not trained again
    accuracies = read(run / "result.json")["test_accuracy"]["each"]
    evaluation, loss = expected("runs", "finished", "evaluation"), expected("runs", "finished", "loss")
    assert main(["evaluate", str(run), "--seed-index", "0"]) == 0
    report = read(run / "evaluation.json")
    assert report["accuracy"] == accuracies[0]
    assert_holds(report, evaluation, 0.0)
    assert abs(report["loss"] - loss) <= TOLERANCE


def test_a_finished_run_predicts_and_is_exported_as_before(unpacked, selected, images, pictures, capsys):
    run = unpacked("finished")
    probabilities = selected["probabilities"]
    # The command rounds to six digits.
    assert np.abs(predicted(capsys, [str(run), *pictures, "--seed-index", "1"]) - probabilities).max() <= 2 * TOLERANCE
    for index in range(2):
        assert_trees(selected_now(run, index), selected[f"finished_{index}"])
    exported = jax.export.deserialize(bytearray(Path("exported_1", "model.jaxexport").read_bytes()))
    assert np.abs(exported.call(images) - probabilities).max() <= TOLERANCE
    old = read(FIXTURES / "export" / "export.json")
    assert_holds(read(Path("exported_1", "export.json")), {**timeless(old), "sha256": {}, "exported_with": {}}, 0.0)


def test_an_export_is_read_and_computes_as_before(selected, images, pictures, capsys):
    path = FIXTURES / "export"
    assert_trees(read_variables(path / "params.safetensors"), selected["finished_1"])
    program = jax.export.deserialize(bytearray((path / "model.jaxexport").read_bytes()))
    assert np.abs(program.call(images) - selected["probabilities"]).max() <= TOLERANCE
    now = predicted(capsys, [*pictures, "--artifact", str(path)])
    assert np.abs(now - selected["probabilities"]).max() <= 2 * TOLERANCE


@pytest.mark.parametrize("name", ["unfinished", pytest.param("unfinished_paper", marks=pytest.mark.slow)])
def test_an_unfinished_run_ends_where_it_would_have_ended(name, unpacked, selected):
    run, wanted = unpacked(name), expected("runs", name)
    before = lines_of(run)
    assert before and not (run / "result.json").exists()
    assert main(wanted["command"]) == 0
    same = machine() == expected("machine")
    tolerance = 0.0 if same else TRAINED_TOLERANCE
    lines = lines_of(run)
    assert lines[: len(before)] == before  # times included: it went on, and did not start again
    assert_holds(timeless(lines), wanted["metrics"], tolerance)
    assert_holds(timeless(read(run / "result.json")), wanted["result"], tolerance)
    last = len(wanted["result"]["seeds"]) - 1
    # Elsewhere the losses have to do: where batch norm makes a gradient nothing but rounding, Adam makes steps of it.
    assert_trees(selected_now(run, last), selected[f"{name}_{last}"], 0.0 if same else np.inf)


@pytest.fixture(params=["progressive", "progressive_norm", "spinal", "mlp", "dense"])
def head_case(request):
    """(head, its arrays)."""
    described = expected("heads", request.param)
    arrays = read_variables(FIXTURES / "heads.safetensors")
    head = getattr(pspinal_jax, described["class"])(**described["attributes"])
    return head, {**arrays[request.param], "features": arrays["features"]}


def test_heads_draw_and_compute_as_before(head_case):
    head, arrays = head_case
    forms = {form: arrays[form] for form in ("tree", "fused", "packed") if form in arrays}

    @jax.jit
    def compute(forms, features):
        rngs = {"dropout": jax.random.key(DROPOUT_KEY)}
        outputs = {}
        for form, variables in forms.items():
            logits, new = head.apply(variables, features, train=True, rngs=rngs, mutable=["batch_stats"])
            outputs[form] = {"eval": head.apply(variables, features, train=False), "train": logits, "new": dict(new)}
        return head.init(jax.random.key(INIT_KEY), features, train=False), outputs

    init, outputs = compute(forms, arrays["features"])
    assert_trees(init, arrays["init"], TOLERANCE)
    for form, output in outputs.items():
        if form == "packed" and output["new"]:
            output["new"]["batch_stats"] = pspinal_jax.unpack_batch_stats(output["new"]["batch_stats"])
        assert_trees(output, arrays["outputs"], TOLERANCE)


@pytest.mark.parametrize("case", ["progressive", "progressive_norm"])
def test_the_forms_of_a_head_are_as_before(case):
    arrays = read_variables(FIXTURES / "heads.safetensors")[case]
    tree, fused, packed = (arrays[form] for form in ("tree", "fused", "packed"))
    assert_trees(pspinal_jax.fuse_params(tree["params"]), fused["params"])
    assert_trees(pspinal_jax.unfuse_params(fused["params"]), tree["params"])
    assert_trees(pspinal_jax.pack_params(tree["params"]), packed["params"])
    assert_trees(pspinal_jax.unpack_params(packed["params"]), tree["params"])
    stats, packed_stats = tree.get("batch_stats", {}), packed.get("batch_stats", {})
    assert_trees(pspinal_jax.pack_batch_stats(stats), packed_stats)
    assert_trees(pspinal_jax.unpack_batch_stats(packed_stats), stats)


def test_other_libraries_take_the_older_tree():
    arrays = read_variables(FIXTURES / "heads.safetensors")
    features, case = arrays["features"], arrays["progressive_norm"]
    attributes, tree = expected("heads", "progressive_norm", "attributes"), case["tree"]
    _, apply = progressive_head(**attributes)
    key = jax.random.key(DROPOUT_KEY)
    run = jax.jit(lambda params, stats: apply(params, stats, features, train=True, key=key))
    logits, stats = run(tree["params"], tree["batch_stats"])
    outputs = {"train": logits, "new": {"batch_stats": stats}}
    assert_trees(outputs, {name: case["outputs"][name] for name in outputs}, TOLERANCE)

    head = interop_nnx.ProgressiveSpinalHead(features.shape[1], **attributes, rngs=nnx.Rngs(0))
    interop_nnx.load_linen(head, tree)
    assert_trees(interop_nnx.to_linen(head), tree)
    head.eval()
    assert_trees({"eval": nnx.jit(lambda head: head(features))(head)}, {"eval": case["outputs"]["eval"]}, TOLERANCE)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_have_the_older_names_and_shapes(name):
    """The way to PyTorch's names and back refuses a tree whose names or shapes are not the model's."""
    described = expected("backbones", name)
    to_state_dict, to_variables = BACKBONES[name]
    flat = {key: np.zeros(shape, dtype) for key, (*shape, dtype) in described["variables"].items()}
    state_dict = to_state_dict(unflatten_dict(flat, sep="/"))
    assert shapes(state_dict) == described["state_dict"]
    assert shapes(flatten_dict(to_variables(state_dict), sep="/")) == described["variables"]


def shapes(arrays):
    return {name: [*array.shape, str(array.dtype)] for name, array in arrays.items()}


def test_variables_are_saved_in_the_older_format(tmp_path):
    path = FIXTURES / "export" / "params.safetensors"
    save_variables(tmp_path / "again.safetensors", read_variables(path))
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
