"""`export`: a run's selected parameters as files that JAX alone runs.

model.jaxexport      the serialised program, parameters included
export.json          class names, input, source and versions; checksums of the others, and of itself
params.safetensors   the parameters and running statistics by themselves, see `pspinal_jax.weights.save_variables`
score.jaxexport      where the run can tell what belongs to no class: a program that takes the arrays of the two
                     .safetensors files by their names, in one dict, and inputs, and gives probabilities and scores
unknown.safetensors  what the score needs, see pspinal_jax.runs.calibration, which tells the formulas

export.json has `temperature`, which both programs apply, and `unknown`, the share `accept` and its `threshold`, where
the run has them.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from pspinal_jax.checkpoints.checksum import file_checksum
from pspinal_jax.environment import versions
from pspinal_jax.errors import RunError
from pspinal_jax.files import check_target, expanded, read_bytes
from pspinal_jax.models import build_model, count_parameters
from pspinal_jax.runs.calibration import ACCEPT, Calibration, Unknown, read_calibration
from pspinal_jax.runs.directory import (
    RunDirectory,
    load_recipe_of,
    read_checked,
    verify_files,
    write_checked,
    writing,
)
from pspinal_jax.runs.result import load_variables
from pspinal_jax.weights.variables import SEPARATOR, first_not_finite, read_variables, save_variables

PROGRAM = "model.jaxexport"
DESCRIPTION = "export.json"
PARAMETERS = "params.safetensors"
SCORE_PROGRAM = "score.jaxexport"
UNKNOWN = "unknown.safetensors"
FORMAT = "pspinal_jax export 1"
PLATFORMS = ("cpu", "cuda", "tpu")
# Of parameters: the format (flatbuffers) ends at 2 GiB, and the program itself takes some.
MAX_BYTES = 2**31 - 2**24
_FILES = (PROGRAM, DESCRIPTION, PARAMETERS, SCORE_PROGRAM, UNKNOWN)
_ADVICE = "export the run again"


class _Input(TypedDict):
    fit: NotRequired[Literal["squash", "crop", "pad"]]
    columns: NotRequired[list[str]]


class _Data(TypedDict):
    settings: dict[str, Any]
    protocol: str
    fingerprint: str


class _Description(TypedDict):
    """What is read of export.json; the settings of its data are checked where they are used."""

    format: Literal["pspinal_jax export 1"]
    class_names: list[str]
    input: _Input
    output: dict[str, Any]
    recipe: NotRequired[str]
    data: NotRequired[_Data]
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


def export_run(run: str | Path, output: str | Path | None = None, seed_index: int | None = None) -> Path:
    """Write the export of a finished run.

    Args:
      run: run directory.
      output: the directory to write; by default ``run / "export"``.
      seed_index: which of the run's seeds; by default the best on validation.

    Returns:
      The directory written.

    Raises:
      PSpinalError: if `run` is not a finished run, or `output` cannot be written or holds anything but an export.
    """
    run = expanded(run)
    output = run / "export" if output is None else expanded(output)
    result = RunDirectory(run).finished_result()
    _check_free(output)
    variables, config, seed_index = load_variables(run, seed_index)
    recipe, shape, names = load_recipe_of(config), tuple(config["input_shape"]), config["class_names"]
    # The documented tree, computed in the layout that suits it.
    inference = dataclasses.replace(recipe.model, implementation="auto", remat=False)
    model = build_model(dataclasses.replace(recipe, model=inference), shape, len(names))
    calibration = read_calibration(RunDirectory(run), seed_index)
    temperature, unknown = (None, None) if calibration is None else calibration
    of_inputs = {"input_shape": shape, "input_dtype": config["input_dtype"], "transposed": recipe.data.transposed}
    exported = export_classifier(model, variables, **of_inputs, temperature=temperature)
    score = None
    if calibration is not None and unknown is not None:
        score = export_score(model, variables, **of_inputs, calibration=calibration)
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
            "settings": config["identity"]["data"],
            "protocol": recipe.protocol,
            "fingerprint": config["identity"]["data_fingerprint"],
        },
        "trained_with": config["versions"],
        "exported_with": versions(),
    }
    if temperature is not None:
        description["temperature"] = temperature
    if unknown is not None:
        description["unknown"] = {"accept": ACCEPT, "threshold": unknown.threshold()}
    write_export(output, exported, variables, description, score)
    return output


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
      variables: what it applies.
      input_shape: one example's shape; the batch size N is left open.
      input_dtype: their dtype.
      transposed: the model saw images with rows and columns swapped; the program takes them upright and swaps them.
      temperature: divides the logits; None for 1.

    Returns:
      Its ``call`` takes one array of inputs and gives float32 [N, C], each row of sum 1.

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


def write_export(
    path: Path,
    exported: export.Exported,
    variables: dict[str, Any],
    description: dict[str, Any],
    score: Score | None = None,
) -> None:
    """Write an export to the directory `path`, whole or not at all, in place of an older one.

    Args:
      path: the directory; its parents are made.
      exported: of `export_classifier`.
      variables: written beside it, by themselves.
      description: the content of export.json besides format and checksums: at least class_names, input and output.
      score: of `export_score`, or None.

    Raises:
      RunError: if `path` holds something else, or cannot be written.
    """
    path = expanded(path).resolve()
    _check_free(path)
    with writing(path), _new_folder(path) as part:
        (part / PROGRAM).write_bytes(exported.serialize())
        save_variables(part / PARAMETERS, variables)
        if score is not None:
            (part / SCORE_PROGRAM).write_bytes(score.exported.serialize())
            of_unknown = {name: leaf for name, leaf in score.arrays.items() if name.startswith("unknown/")}
            save_variables(part / UNKNOWN, of_unknown)
        checksums = {file.name: file_checksum(file) for file in sorted(part.iterdir())}
        write_checked(part / DESCRIPTION, {"format": FORMAT, **description, "sha256": checksums})


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, which takes its place at the end of the `with`; what a kill leaves, the next removes."""
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
    """Return if `path` is an export; RunError says what to give otherwise."""
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
    """The program for scores of the export in `path`, of this description; None where it has none.

    Raises:
      PSpinalError: if it is damaged.
    """
    if SCORE_PROGRAM not in description["sha256"]:
        return None
    files = (PARAMETERS, UNKNOWN)
    verify_files(path, description["sha256"], files, _ADVICE)
    trees = [flatten_dict(read_variables(path / name), sep=SEPARATOR) for name in files]
    return Score(_read_program(path / SCORE_PROGRAM, description["sha256"]), trees[0] | trees[1])
