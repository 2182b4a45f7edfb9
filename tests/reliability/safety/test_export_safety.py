"""Exports: what a killed one left, and what is not an export's program; models that are not finite."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

from pspinal_jax.checkpoints.checksum import file_checksum, json_checksum
from pspinal_jax.errors import RunError
from pspinal_jax.heads import DenseHead
from pspinal_jax.models import Classifier
from pspinal_jax.runs.export import export_classifier, read_export, write_export
from pspinal_jax.runs.predict import predict

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    model = Classifier(DenseHead(3))
    return model, model.init(jax.random.key(0), IMAGES, train=False)


@pytest.fixture(scope="module")
def program(model):
    return export_classifier(*model, (4, 4, 1), np.uint8)


def write(path, program, variables):
    names = ["a", "b", "c"]
    description = {"class_names": names, "input": {}, "output": {}}
    write_export(path, program, variables, description)
    return path


@pytest.fixture
def export(program, model, tmp_path):
    return write(tmp_path / "out", program, model[1])


def test_what_a_killed_export_left_is_removed_and_nothing_else(export, program, model, tmp_path):
    left = [tmp_path / f".out.export-{kind}" for kind in ("part", "old")]
    others = [tmp_path / "out.part", tmp_path / "out.old", tmp_path / ".out"]
    for folder in (*left, *others):
        folder.mkdir()
        (folder / "params.safetensors.12-34.part").write_text("cut")  # as the atomic write leaves it
    write(export, program, model[1])
    assert [folder.exists() for folder in left] == [False, False] and all(folder.exists() for folder in others)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "pspinal_jax export 1"}', "[" * 100_000, "\\udcff"])
def test_a_damaged_description_is_one_line_and_a_new_export_replaces_it(export, program, model, content):
    (export / "export.json").write_text(content)
    with pytest.raises(RunError) as caught:
        read_export(export)
    assert "\n" not in str(caught.value)
    if content != "[]":  # which may be of another program
        write(export, program, model[1])
        assert read_export(export).description["class_names"] == ["a", "b", "c"]


def test_swapped_class_names_are_seen(export):
    text = (export / "export.json").read_text()
    (export / "export.json").write_text(text.replace('"a"', '"d"'))
    with pytest.raises(RunError, match="does not match its checksum"):
        predict(export, IMAGES)


def test_an_export_of_before_checksums_still_opens(export, tmp_path):
    description = json.loads((export / "export.json").read_text())
    del description["checksum"]
    (export / "export.json").write_text(json.dumps(description))
    assert predict(export, IMAGES)[0].error is None


def put_program(path, content):
    """`content` as the program of the export `path`, with checksums that fit, as somebody else would make it."""
    (path / "model.jaxexport").write_bytes(content)
    description = json.loads((path / "export.json").read_text())
    del description["checksum"]
    description["sha256"]["model.jaxexport"] = file_checksum(path / "model.jaxexport")
    (path / "export.json").write_text(json.dumps({**description, "checksum": json_checksum(description)}))


def exported(function, inputs=1):
    specs = [jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.uint8)] * inputs
    return bytes(jax_export.export(jax.jit(function))(*specs).serialize())


UNREADABLE = "cannot be read by jax"
OTHER_SHAPES = "does not take inputs to probabilities of 3 classes"
OTHER_PROGRAMS = {
    "empty": (lambda: b"", UNREADABLE),
    "words": (lambda: b"no program at all" * 50, UNREADABLE),
    "zeros": (lambda: bytes(1000), UNREADABLE),
    "other classes": (lambda: exported(lambda x: jnp.zeros((2, 7))), OTHER_SHAPES),
    "fewer classes": (lambda: exported(lambda x: jnp.zeros((2, 2))), OTHER_SHAPES),
    "two inputs": (lambda: exported(lambda x, y: jnp.zeros((2, 3)), 2), OTHER_SHAPES),
    "two outputs": (lambda: exported(lambda x: (jnp.zeros((2, 3)), jnp.zeros((2, 3)))), OTHER_SHAPES),
    "no matrix": (lambda: exported(lambda x: jnp.zeros(3)), OTHER_SHAPES),
    "fixed batch": (lambda: exported(lambda x: jnp.zeros((2, 3))), "cannot be run: Shape mismatch"),
}


@pytest.mark.parametrize("name", OTHER_PROGRAMS)
def test_what_is_not_our_program_is_one_line(export, name):
    make, message = OTHER_PROGRAMS[name]
    put_program(export, make())
    with pytest.raises(RunError, match=message) as caught:
        predict(export, IMAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_mutated_programs_are_one_line_or_run(export):
    """With checksums that fit: only what jax's own reader lets through is run. A process each: a reader may crash."""
    whole = (export / "model.jaxexport").read_bytes()
    rng = np.random.default_rng(0)
    np.save(export.parent / "images.npy", IMAGES)
    code = (
        "import sys, numpy as np\n"
        "from pspinal_jax.errors import RunError\n"
        "from pspinal_jax.runs.predict import predict\n"
        "try:\n    predict(sys.argv[1], np.load(sys.argv[2]))\n"
        "except RunError as error:\n    sys.exit(1 if '\\n' not in str(error) else 3)"
    )
    for _ in range(12):
        changed = bytearray(whole)
        for index in rng.integers(len(whole), size=5):
            changed[index] = rng.integers(256)
        put_program(export, bytes(changed))
        command = [sys.executable, "-c", code, str(export), str(export.parent / "images.npy")]
        assert subprocess.run(command, capture_output=True).returncode in (0, 1)


def test_an_export_that_gives_no_finite_probabilities_is_refused(export):
    batch = jax_export.symbolic_shape("N")[0]
    specs = jax.ShapeDtypeStruct((batch, 4, 4, 1), jnp.uint8)
    logs = jax.jit(lambda images: jnp.log(-1.0 - images[:, 0, :3, 0].astype(jnp.float32)))
    put_program(export, bytes(jax_export.export(logs)(specs).serialize()))
    with pytest.raises(RunError, match="probabilities that are not finite"):
        predict(export, IMAGES)


def test_variables_that_are_not_finite_are_not_exported(model):
    """As constants: what XLA makes of a NaN there is nothing to rely on (jax 0.10.2 gave 1 / C for each class)."""
    module, variables = model
    poisoned = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    with pytest.raises(RunError, match="not finite, params/"):
        export_classifier(module, poisoned, (4, 4, 1), np.uint8)


def test_nothing_is_left_beside_an_export(export):
    assert [path.name for path in export.parent.iterdir()] == ["out"]
    shutil.rmtree(export)
