"""`export`: a run's selected parameters as programs that need only JAX, or ONNX Runtime.

model.jaxexport      the serialised program, parameters included
model.onnx           the same for ONNX Runtime, with scores; with format='onnx'
export.json          class names, input, source and versions; checksums of the others, and of itself
params.safetensors   the parameters and running statistics, see `pspinal_jax.weights.save_variables`
score.jaxexport      if the run can reject unknown images: a program for probabilities and scores
unknown.safetensors  the arrays that the score needs; pspinal_jax.runs.calibration has the formulas

The program in score.jaxexport takes a dict with the arrays of the two .safetensors files by name, and inputs. If the
run has them, export.json has `temperature`, which all programs apply, and `unknown`, with the fraction `accept` and its
`threshold`.
"""

import contextlib
import dataclasses
import datetime
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from pspinal_jax.checkpoints.checksum import file_checksum
from pspinal_jax.data import load_data
from pspinal_jax.environment import convolving_by_library, versions
from pspinal_jax.errors import PSpinalError, RunError, UsageError
from pspinal_jax.files import check_target, expanded, json_text, read_bytes
from pspinal_jax.models import build_model, count_parameters
from pspinal_jax.progress import absl_quietened, warn
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.calibration import ACCEPT, Calibration, Unknown, read_calibration
from pspinal_jax.runs.directory import (
    RunDirectory,
    load_recipe_of,
    read_checked,
    verify_files,
    write_checked,
    writing,
)
from pspinal_jax.runs.onnx_model import OPSET, check_installed, run_onnx, write_onnx
from pspinal_jax.runs.result import load_variables
from pspinal_jax.weights.variables import SEPARATOR, first_not_finite, read_variables, save_variables

PROGRAM = "model.jaxexport"
ONNX = "model.onnx"
DESCRIPTION = "export.json"
PARAMETERS = "params.safetensors"
SCORE_PROGRAM = "score.jaxexport"
UNKNOWN = "unknown.safetensors"
FORMAT = "pspinal_jax export 1"
PLATFORMS = ("cpu", "cuda", "tpu")
# Of parameters: the format (flatbuffers) ends at 2 GiB, and the program itself takes some.
MAX_BYTES = 2**31 - 2**24
GUARANTEE = datetime.timedelta(days=182)
"""Duration of JAX's guarantee: versions built up to six months after the jaxlib that wrote a program can read it."""
_MAX_CHECKED = 100
_TOLERANCE = 1e-5
_FILES = (PROGRAM, ONNX, DESCRIPTION, PARAMETERS, SCORE_PROGRAM, UNKNOWN)
_ADVICE = "export the run again"


class _Input(TypedDict):
    fit: NotRequired[Literal["squash", "crop", "pad"]]
    columns: NotRequired[list[str]]


class _Data(TypedDict):
    settings: dict[str, Any]
    protocol: str
    fingerprint: str


class _Description(TypedDict):
    """The entries of export.json that are read; the settings of its data are checked where they are used."""

    format: Literal["pspinal_jax export 1"]
    class_names: list[str]
    input: _Input
    output: dict[str, Any]
    recipe: NotRequired[str]
    data: NotRequired[_Data]
    model: NotRequired[dict[str, Any]]
    temperature: NotRequired[float]
    unknown: NotRequired[dict[str, float]]
    sha256: dict[str, str]


class Artifact(NamedTuple):
    """An export, read back.

    Attributes:
      exported: the program; ``exported.call(inputs [N, ...])`` gives probabilities float32 [N, C].
      description: the content of export.json; its class_names are in the order of the probabilities.
    """

    exported: export.Exported
    description: dict[str, Any]


class Score(NamedTuple):
    """The program of `SCORE_PROGRAM`.

    Attributes:
      exported: ``exported.call(arrays, inputs [N, ...])`` gives probabilities float32 [N, C] and scores float32 [N].
      arrays: its first argument.
    """

    exported: export.Exported
    arrays: dict[str, Any]

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the program, and what it takes beside a model's variables; export.json needs no entry of it."""
        (folder / SCORE_PROGRAM).write_bytes(self.exported.serialize())
        of_unknown = {name: leaf for name, leaf in self.arrays.items() if name.startswith("unknown/")}
        save_variables(folder / UNKNOWN, of_unknown)
        return {}


class _Source(NamedTuple):
    """What is exported: a run's model, or an older export's.

    Attributes:
      recipe: of the run.
      variables: the model's, on the host.
      shape: of one input.
      dtype: of the inputs.
      calibration: of the run, or None.
      description: the content of export.json but for versions and checksums.
    """

    recipe: Recipe
    variables: dict[str, Any]
    shape: tuple[int, ...]
    dtype: str
    calibration: Calibration | None
    description: dict[str, Any]

    def model(self, **changes: Any) -> nn.Module:
        """The model for the documented tree, computed in the layout that suits it; `changes` are to the recipe."""
        inference = dataclasses.replace(self.recipe.model, implementation="auto", remat=False)
        recipe = dataclasses.replace(self.recipe, **{"model": inference, **changes})
        return build_model(recipe, self.shape, len(self.description["class_names"]))


@absl_quietened()
def export_run(
    run: str | Path,
    output: str | Path | None = None,
    seed_index: int | None = None,
    format: Literal["jax", "onnx"] = "jax",
) -> Path:
    """Write the export of a finished run.

    Args:
      run: a run directory, or an older export, which is written again.
      output: directory to write, by default ``run / "export"`` or, for an export, `run` itself.
      seed_index: index of the run's seed; by default the seed that is best on validation.
      format: 'onnx' adds model.onnx, for ONNX Runtime.

    Returns:
      The directory that was written.

    Raises:
      PSpinalError: if `run` is neither a finished run nor an export, `output` cannot be written or holds anything but
        an export, or model.onnx does not give the run's probabilities.
    """
    run = expanded(run)
    again = is_export(run)
    output = (run if again else run / "export") if output is None else expanded(output)
    if format == "onnx":
        check_installed()
    if not again:
        RunDirectory(run).finished_result()
    _check_free(output)
    source = _of_export(run, seed_index) if again else _of_run(run, seed_index)
    model, calibration = source.model(), source.calibration
    temperature, unknown = (None, None) if calibration is None else calibration
    of_inputs: dict[str, Any] = {
        "input_shape": source.shape,
        "input_dtype": source.dtype,
        "transposed": source.recipe.data.transposed,
    }
    exported = export_classifier(model, source.variables, **of_inputs, temperature=temperature)
    more: list[Callable[[Path], dict[str, Any]]] = []
    if calibration is not None and unknown is not None:
        more.append(export_score(model, source.variables, **of_inputs, calibration=calibration).write)
    if format == "onnx":
        more.append(partial(_write_onnx, source))
    until = datetime.date.today() + GUARANTEE
    description = source.description | {"exported_with": versions(), "guaranteed_until": until.isoformat()}
    write_export(output, exported, source.variables, description, more)
    return output


def _of_run(run: Path, seed_index: int | None) -> _Source:
    result = RunDirectory(run).finished_result()
    variables, config, seed_index = load_variables(run, seed_index)
    recipe, shape, names = load_recipe_of(config), tuple(config["input_shape"]), config["class_names"]
    calibration, identity = read_calibration(RunDirectory(run), seed_index), config["identity"]
    description = {
        "class_names": names,
        "input": {
            "shape": ["N", *shape],
            "dtype": config["input_dtype"],
            **({"fit": recipe.data.fit} if recipe.data.fit != "squash" else {}),
            **({"columns": config["columns"]} if config.get("columns") else {}),
        },
        "output": {"shape": ["N", len(names)], "dtype": "float32", "holds": "probabilities"},
        "recipe": recipe.card.name,
        "backbone": recipe.model.backbone,
        "head": recipe.model.head,
        "parameters": count_parameters(variables["params"]),
        "seed": recipe.seed + seed_index,
        "test_accuracy": result["test_accuracy"]["each"][seed_index],
        "selection": result["selection"],
        # For `evaluate`: how the data was read, and its checksum; not where it lay.
        "data": {
            "settings": identity["data"],
            "protocol": recipe.protocol,
            "fingerprint": identity["data_fingerprint"],
        },
        # For exporting again; weights may name a file.
        "model": {**identity["model"], "weights": None, "dtype": recipe.dtype},
        "trained_with": config["versions"],
    }
    if calibration is not None:
        description["temperature"] = calibration.temperature
        if calibration.unknown is not None:
            description["unknown"] = {"accept": ACCEPT, "threshold": calibration.unknown.threshold()}
    return _Source(recipe, jax.device_get(variables), shape, config["input_dtype"], calibration, description)


def _of_export(path: Path, seed_index: int | None) -> _Source:
    """Raises RunError where the export is damaged, or of a version that did not write what its model is."""
    if seed_index is not None:
        raise UsageError(f"seed_index is {seed_index}, but {path} is an export, of one seed; leave it out")
    description = read_checked(path / DESCRIPTION, _Description, advice=_ADVICE)
    if "model" not in description or "data" not in description:
        raise RunError(f"{path} is of a version that did not write what its model is; {_ADVICE}")
    files = [PARAMETERS, *([UNKNOWN] if "unknown" in description else [])]
    verify_files(path, description["sha256"], files, _ADVICE)
    variables, *others = (read_variables(path / name) for name in files)
    calibration = None
    if "temperature" in description:
        unknown = Unknown.of(flatten_dict(others[0], sep=SEPARATOR)) if others else None
        calibration = Calibration(description["temperature"], unknown)
    model, data, inputs = dict(description["model"]), description["data"]["settings"], description["input"]
    identity = {"card": {"name": description["recipe"]}, "dtype": model.pop("dtype"), "model": model, "data": data}
    recipe = load_recipe_of({"identity": identity, "data_location": {}})
    kept = {name: value for name, value in description.items() if name not in ("format", "sha256", "onnx")}
    return _Source(recipe, variables, tuple(inputs["shape"][1:]), inputs["dtype"], calibration, kept)


def export_classifier(
    model: nn.Module,
    variables: dict[str, Any],
    input_shape: tuple[int, ...],
    input_dtype: Any,
    *,
    transposed: bool = False,
    temperature: float | None = None,
) -> export.Exported:
    """The program inputs -> probabilities of `model`, lowered for `PLATFORMS`, with its variables as constants.

    Args:
      model: called as ``model.apply(variables, inputs [N, ...], train=False) -> logits [N, C]``.
      variables: the model's variables.
      input_shape: shape of one example; the batch size N is variable.
      input_dtype: dtype of the inputs.
      transposed: whether the model saw images with rows and columns swapped. The program takes upright images and swaps
        them.
      temperature: divisor of the logits; None for 1.

    Returns:
      The exported program. Its ``call`` maps inputs to float32 [N, C], where each row sums to 1.

    Raises:
      RunError: if the variables are too large for one file, or not finite.
    """
    # Host arrays: nothing of the devices that hold them enters the program.
    held = jax.device_get(variables)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    if size > MAX_BYTES:
        raise RunError(f"the parameters take {size / 1e9:.1f} GB; an export holds up to {MAX_BYTES / 1e9:.1f} GB")
    # XLA's CPU compiler may make anything of a constant that is NaN.
    if (name := first_not_finite(held)) is not None:
        raise RunError(f"the variables are not finite, {name} first; an export would give no probabilities")

    def probabilities(inputs: jax.Array) -> jax.Array:
        logits = model.apply(held, inputs.swapaxes(1, 2) if transposed else inputs, train=False)
        return _softmax(logits, temperature)

    inputs = jax.ShapeDtypeStruct((*export.symbolic_shape("N"), *input_shape), input_dtype)
    return export.export(jax.jit(probabilities), platforms=PLATFORMS)(inputs)


def _softmax(logits: Any, temperature: float | None) -> jax.Array:
    rows = logits.astype(jnp.float32)
    return jax.nn.softmax(rows if temperature is None else rows / temperature)


def export_score(
    model: nn.Module,
    variables: dict[str, Any],
    input_shape: tuple[int, ...],
    input_dtype: Any,
    *,
    calibration: Calibration,
    transposed: bool = False,
) -> Score:
    """The program arrays, inputs -> probabilities and scores; the other arguments are those of `export_classifier`."""
    assert calibration.unknown is not None
    arrays = {**flatten_dict(jax.device_get(variables), sep=SEPARATOR), **calibration.unknown.arrays}

    def answers(arrays: dict[str, Any], inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        held = unflatten_dict({name: leaf for name, leaf in arrays.items() if name not in unknown}, sep=SEPARATOR)
        inputs = inputs.swapaxes(1, 2) if transposed else inputs
        features, logits = model.apply(held, inputs, method="features_and_logits")
        return _softmax(logits, calibration.temperature), Unknown.of(arrays).scores(features)

    unknown = calibration.unknown.arrays.keys()
    inputs = jax.ShapeDtypeStruct((*export.symbolic_shape("N"), *input_shape), input_dtype)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)
    return Score(export.export(jax.jit(answers), platforms=PLATFORMS)(shapes, inputs), arrays)


def _write_onnx(source: _Source, folder: Path) -> dict[str, Any]:
    """Write model.onnx, checked on examples against the same function in JAX; returns the entry of export.json.

    Raises:
      RunError: if they differ, or the function cannot be written as ONNX.
    """
    recipe, calibration, description = source.recipe, source.calibration, source.description
    temperature, unknown = (None, None) if calibration is None else calibration
    # Runtimes lack bfloat16, and the writer loops, by which deep heads are computed.
    progressive = recipe.model.head == "progressive"
    plain = dataclasses.replace(recipe.model, implementation="unrolled" if progressive else "auto", remat=False)
    model = source.model(model=plain, dtype="float32")

    def outputs(variables: Any, inputs: jax.Array) -> dict[str, jax.Array]:
        upright = inputs.swapaxes(1, 2) if recipe.data.transposed else inputs
        found: Any = model.apply(variables, upright, method="features_and_logits")
        features, logits = found
        scores = {} if unknown is None else {"scores": unknown.scores(features)}
        return {"probabilities": _softmax(logits, temperature), **scores}

    names = ("class_names", "input", "recipe", "seed", "unknown")
    metadata = {name: json_text(description[name]) for name in names if name in description}
    with convolving_by_library():  # where batch norm is folded into convolutions, and all of them are convolutions
        example = jax.ShapeDtypeStruct(source.shape, source.dtype)
        write_onnx(folder / ONNX, outputs, source.variables, example, metadata)
    inputs, kind = _examples(source)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(outputs)(source.variables, inputs)
    found = run_onnx(folder / ONNX, [part for part in (inputs[:1], inputs[1:]) if len(part)])
    differences = {name: float(np.abs(found[name] - np.asarray(rows)).max()) for name, rows in expected.items()}
    if not max(differences.values()) <= _TOLERANCE:
        listed = " and ".join(f"{name} by up to {most:.1e}" for name, most in differences.items())
        raise RunError(
            f"{ONNX} was not written: it differs from the run in {listed}, expected at most {_TOLERANCE:g}, on {kind}"
        )
    return {"onnx": {"opset": OPSET, "checked_on": kind, "largest_difference": differences["probabilities"]}}


def _examples(source: _Source) -> tuple[np.ndarray, str]:
    """Up to 100 upright examples of the test split, or noise if the data cannot be read; and a description of them."""
    data, shape, dtype = source.recipe.data, source.shape, source.dtype
    num_classes = None if data.image_size else len(source.description["class_names"])
    try:
        test = load_data(dataclasses.replace(data, num_classes=num_classes), needs_test=False).test
        numbers = np.unique(np.linspace(0, len(test) - 1, min(len(test), _MAX_CHECKED)).astype(int))
        found = np.stack([test.read(int(index), (shape[0], (*shape, 1)[1])) for index in numbers])
        if found.shape[1:] == shape and found.dtype == dtype:
            turned = found.swapaxes(1, 2) if data.transposed else found
            return turned, f"{len(found)} examples of the test split"
        reason = f"its examples are {found.dtype} {list(found.shape[1:])} now"
    except (PSpinalError, ValueError) as error:
        reason = str(error)
    warn(f"{ONNX} is checked on noise, as the run's data cannot be read: {reason}")
    rng, sizes = np.random.default_rng(0), (_MAX_CHECKED, *shape)
    noise = rng.integers(0, 256, sizes) if dtype == "uint8" else rng.normal(size=sizes)
    return noise.astype(dtype), f"{_MAX_CHECKED} examples of noise"


def write_export(
    path: Path,
    exported: export.Exported,
    variables: dict[str, Any],
    description: dict[str, Any],
    more: Iterable[Callable[[Path], dict[str, Any]]] = (),
) -> None:
    """Write an export to the directory `path` atomically, replacing an older one.

    Args:
      path: the directory; its parents are created.
      exported: the program of `export_classifier`.
      variables: the variables, which are also written to a file of their own.
      description: the entries of export.json besides format and checksums: at least class_names, input and output.
      more: functions that write further files into the given folder and return further entries of export.json.

    Raises:
      RunError: if `path` holds something else, or cannot be written.
    """
    path = expanded(path).resolve()
    _check_free(path)
    with writing(path), _new_folder(path) as part:
        (part / PROGRAM).write_bytes(exported.serialize())
        save_variables(part / PARAMETERS, variables)
        for write in more:
            description = {**description, **write(part)}
        checksums = {file.name: file_checksum(file) for file in sorted(part.iterdir())}
        write_checked(part / DESCRIPTION, {"format": FORMAT, **description, "sha256": checksums})


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A context with a temporary folder that replaces `path` at its end; leftovers of a kill are removed next time."""
    part, old = (path.with_name(f".{path.name}.export-{kind}") for kind in ("part", "old"))
    for folder in (part, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    finally:
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)


def is_export(path: Path) -> bool:
    """Whether `path` is a directory with the description of an export."""
    return (path / DESCRIPTION).is_file()


def require_export(path: Path) -> None:
    """Raise RunError unless `path` is an export."""
    if not is_export(path):
        raise RunError(f"{path} is not an export: it has no {DESCRIPTION}; give the output of an `export`")


def _check_free(path: Path) -> None:
    """Raise RunError unless an export can be written to `path`: nothing, an empty directory or an older export."""
    path = expanded(path).resolve()
    check_target(path.parent, "the folder of the export,", f".{path.name}.export-part/{PROGRAM}")
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; choose another output")
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if names and not {PROGRAM, DESCRIPTION} <= {*names} <= {*_FILES}:
        raise RunError(f"{path} holds {', '.join(names[:3])} and is not an export; choose another output")
    try:
        held = read_checked(path / DESCRIPTION, dict[str, Any]) if names else {"format": FORMAT}
    except RunError:  # damaged: a new export replaces it
        return
    if held.get("format") != FORMAT:
        raise RunError(f"{path} holds an {DESCRIPTION} that is not an export's; choose another output")


def read_export(path: Path) -> Artifact:
    """The export in the directory `path`.

    Raises:
      RunError: if there is none, or it is damaged.
    """
    require_export(path)
    description = read_checked(path / DESCRIPTION, _Description, advice=_ADVICE)
    exported = _read_program(path / PROGRAM, description["sha256"])
    inputs, outputs, classes = exported.in_avals, exported.out_avals, len(description["class_names"])
    if len(inputs) != 1 or len(outputs) != 1 or outputs[0].ndim != 2 or outputs[0].shape[1] != classes:
        shapes = ", ".join(str(array) for array in (*inputs, *outputs))
        raise RunError(f"{path / PROGRAM} does not take inputs to probabilities of {classes} classes: {shapes}")
    return Artifact(exported, description)


def _read_program(program: Path, sha256: dict[str, str]) -> export.Exported:
    verify_files(program.parent, sha256, [program.name], _ADVICE)
    try:
        return export.deserialize(bytearray(read_bytes(program, 2**31)))
    except Exception as error:  # of a JAX too old or too new for it; of bytes that are no program, of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise RunError(f"{program} cannot be read by jax {jax.__version__}: {reason}; {_ADVICE}") from error


def read_score(path: Path, description: dict[str, Any]) -> Score | None:
    """The program for scores of the export in `path` with this description, or None.

    Raises:
      PSpinalError: if it is damaged.
    """
    if SCORE_PROGRAM not in description["sha256"]:
        return None
    files = (PARAMETERS, UNKNOWN)
    verify_files(path, description["sha256"], files, _ADVICE)
    trees = [flatten_dict(read_variables(path / name), sep=SEPARATOR) for name in files]
    return Score(_read_program(path / SCORE_PROGRAM, description["sha256"]), trees[0] | trees[1])
