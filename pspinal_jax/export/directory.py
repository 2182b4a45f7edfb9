"""The files of an export.

model.jaxexport     the serialised program, parameters included
export.json         class names, input, source and versions; checksums of the other two
params.safetensors  the parameters and running statistics by themselves, see `pspinal_jax.weights.save_variables`
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from pspinal_jax.errors import RunError
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
      RunError: otherwise; it names what is in the way.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file; choose another --output")
    names = sorted(entry.name for entry in path.iterdir())
    others = [name for name in names if name not in _FILES]
    if names and (others or not is_export(path)):
        raise RunError(f"{path} holds {(others or names)[0]} and is no export; choose another --output")
    if names:
        _describe(path)


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
        path = path.expanduser().resolve()
        check_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part, old = (path.with_name(path.name + suffix) for suffix in (".part", ".old"))
        for leftover in (part, old):
            _discard(leftover)
        part.mkdir()
        (part / PROGRAM).write_bytes(exported.serialize())
        save_variables(part / PARAMETERS, variables)
        checksums = {name: _checksum(part / name) for name in (PROGRAM, PARAMETERS)}
        text = json.dumps({"format": FORMAT, **description, "sha256": checksums}, indent=2)
        (part / DESCRIPTION).write_text(text + "\n")
        if path.exists() and any(path.iterdir()):
            os.replace(path, old)
        os.replace(part, path)
        _discard(old)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def _discard(folder: Path) -> None:
    """Remove what a killed export left behind."""
    if not folder.exists():
        return
    others = [entry.name for entry in folder.iterdir() if entry.name.removesuffix(".part") not in _FILES]
    if others:
        raise RunError(f"{folder} is in the way and holds {others[0]}; move it, or choose another --output")
    shutil.rmtree(folder)


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
        return Artifact(export.deserialize(bytearray(program.read_bytes())), description)
    except OSError as error:
        raise RunError(f"{program} cannot be read: {error.strerror or error}; export the run again") from error
    except (ValueError, KeyError, TypeError) as error:  # of a JAX too old or too new for it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{program} cannot be read by jax {jax.__version__}: {reason}; export the run again") from error


def _describe(path: Path) -> dict[str, Any]:
    """export.json of the export in `path`, found to be one of ours."""
    require_export(path)
    file = path / DESCRIPTION
    try:
        description = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {error}; export the run again") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise RunError(f"{file} does not describe an export of this version: it has no format {FORMAT!r}")
    missing = [key for key in ("class_names", "input", "output", "sha256") if key not in description]
    if missing:
        raise RunError(f"{file} lacks {', '.join(missing)}; export the run again")
    return description


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
