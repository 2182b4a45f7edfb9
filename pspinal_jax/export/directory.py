"""The files of an export.

model.jaxexport     the serialised program, parameters included
export.json         class names, input, source and versions; checksums of the other two, and of itself
params.safetensors  the parameters and running statistics by themselves, see `pspinal_jax.weights.save_variables`
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np
from jax import export

from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import MOST_JSON_BYTES, check_target, expanded, read_bytes, require_file, write_json
from pspinal_jax.recipes.typed import typed
from pspinal_jax.weights.variables import save_variables

PROGRAM = "model.jaxexport"
DESCRIPTION = "export.json"
PARAMETERS = "params.safetensors"
FORMAT = "pspinal_jax export 1"
_FILES = (PROGRAM, DESCRIPTION, PARAMETERS)


def is_export(path: Path) -> bool:
    """Whether `path` is a directory that says of itself that it is an export."""
    return (path / DESCRIPTION).is_file()


def require_export(path: Path) -> None:
    """Return if `path` is an export; RunError says what to give otherwise."""
    if not is_export(path):
        raise RunError(f"{path} is no export: it has no {DESCRIPTION}; give the --output of an `export`")


def check_free(path: Path) -> None:
    """Return if an export may be written to `path`: nothing is there, an empty directory or an older export.

    Raises:
      RunError: otherwise; it names what is in the way, or says why it cannot be written.
    """
    path = expanded(path).resolve()
    check_target(path.parent, "the folder of the export,", f"{path.name}.{_this_process()}.part/{PROGRAM}")
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file; choose another --output")
    names = sorted(entry.name for entry in path.iterdir())
    others = [name for name in names if name not in _FILES]
    if names and (others or not is_export(path)):
        raise RunError(f"{path} holds {(others or names)[0]} and is no export; choose another --output")
    if names:
        with contextlib.suppress(_Damaged):  # what is damaged, a new export replaces
            _read_description(path / DESCRIPTION)


def write_export(path: Path, exported: export.Exported, variables: dict[str, Any], description: dict[str, Any]) -> None:
    """Write an export to the directory `path`, whole or not at all; one that is there is replaced.

    Args:
      path: the directory; its parents are made.
      exported: of `export_classifier`.
      variables: written beside it, by themselves.
      description: what export.json holds besides format and checksums: at least class_names, input and output.

    Raises:
      RunError: if `path` holds something else, or cannot be written.
    """
    try:
        path = expanded(path).resolve()
        check_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _discard_leftovers(path)
        # Names of this process's own: neither another export nor what a killed one left is in the way.
        part, old = (path.with_name(f"{path.name}.{_this_process()}.{kind}") for kind in ("part", "old"))
        try:
            part.mkdir()
            (part / PROGRAM).write_bytes(exported.serialize())
            save_variables(part / PARAMETERS, variables)
            checksums = {name: _checksum(part / name) for name in (PROGRAM, PARAMETERS)}
            content = {"format": FORMAT, **description, "sha256": checksums}
            write_json(part / DESCRIPTION, content | {"checksum": json_checksum(content)})
            if path.exists() and any(path.iterdir()):
                os.replace(path, old)
            os.replace(part, path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def _this_process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _discard_leftovers(path: Path) -> None:
    """Remove what killed exports to `path` left beside it: of processes of this machine that are no more."""
    for folder in path.parent.glob(f"{glob.escape(path.name)}.*"):
        host, _, number = folder.name.removeprefix(f"{path.name}.").rpartition(".")[0].rpartition("-")
        ours = folder.suffix in (".part", ".old") and host == socket.gethostname() and number.isdecimal()
        if ours and (int(number) == os.getpid() or not _lives(int(number))):
            shutil.rmtree(folder, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An export, read back.

    Attributes:
      exported: the program; ``exported.call(inputs [N, ...])`` gives probabilities float32 [N, C].
      description: what export.json holds.
    """

    exported: export.Exported
    description: dict[str, Any]

    @property
    def class_names(self) -> list[str]:
        """Names of the C classes, in the order of the probabilities."""
        return self.description["class_names"]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """One example's shape."""
        return tuple(self.exported.in_avals[0].shape[1:])

    @property
    def input_dtype(self) -> np.dtype:
        """The inputs' dtype: uint8 for images, float32 for features."""
        return self.exported.in_avals[0].dtype


def read_export(path: Path) -> Artifact:
    """The export in the directory `path`.

    Raises:
      RunError: if there is none, or it is damaged.
    """
    description = _describe(path)
    program = path / PROGRAM
    try:
        if _checksum(program) != description["sha256"][PROGRAM]:
            raise RunError(f"{program} is damaged: its checksum is not the one in {DESCRIPTION}; export the run again")
        exported = export.deserialize(bytearray(read_bytes(program, 2**31)))
        _check_program(exported, description)
        return Artifact(exported, description)
    except OSError as error:
        raise RunError(f"{program} cannot be read: {error.strerror or error}; export the run again") from error
    except RunError:
        raise
    except Exception as error:  # of a JAX too old or too new for it; of bytes that are no program, of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise RunError(f"{program} cannot be read by jax {jax.__version__}: {reason}; export the run again") from error


def _describe(path: Path) -> dict[str, Any]:
    """export.json of the export in `path`, found to be one of ours."""
    require_export(path)
    return _read_description(path / DESCRIPTION)


class _Damaged(RunError):
    pass


class _Input(TypedDict):
    fit: NotRequired[str]
    columns: NotRequired[list[str]]


class _Description(TypedDict):
    """What is read of export.json; how its data is read is looked at where that is asked for."""

    class_names: list[str]
    input: _Input
    output: dict[str, Any]
    recipe: NotRequired[str]
    sha256: dict[str, str]


def _read_description(file: Path) -> dict[str, Any]:
    try:
        description = json.loads(read_bytes(file, MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise _Damaged(f"{file} cannot be read: {error}; export the run again") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise RunError(f"{file} does not describe an export of this version: it has no format {FORMAT!r}")
    checksum = description.pop("checksum", None)  # which older exports have not
    if checksum not in (None, json_checksum(description)):
        raise _Damaged(f"{file} is damaged: it does not match its checksum; export the run again")
    try:
        typed("it", description, _Description)
    except UsageError as error:
        raise _Damaged(f"{file} is damaged: {error}; export the run again") from error
    return description


def _check_program(exported: export.Exported, description: dict[str, Any]) -> None:
    """Return if the program takes one array of inputs to one of probabilities, of as many classes as have names."""
    inputs, outputs = exported.in_avals, exported.out_avals
    classes = len(description["class_names"])
    if len(inputs) != 1 or len(outputs) != 1 or outputs[0].ndim != 2 or outputs[0].shape[1] != classes:
        shapes = [str(array) for array in (*inputs, *outputs)]
        raise RunError(f"{PROGRAM} does not take inputs to probabilities of {classes} classes: {', '.join(shapes)}")


def _checksum(path: Path) -> str:
    require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
