"""manifest.json: checksums of a run's files that decide an answer and hold no checksum of their own."""

import hashlib
from pathlib import Path

from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.errors import RunError
from pspinal_jax.files import require_file
from pspinal_jax.runs.directory import read_json, write_json

MANIFEST = "manifest.json"


def record(directory: Path, *names: str) -> None:
    """Write down the files `names` of the run `directory` as they are now, beside those that were before.

    Raises:
      RunError: if one cannot be read, or the manifest cannot be written.
    """
    files = recorded(directory) | {name: _sha256(directory / name) for name in names}
    write_json(directory / MANIFEST, {"sha256": files, "checksum": json_checksum(files)})


def recorded(directory: Path) -> dict[str, str]:
    """SHA-256 by the name of every file that was written down; {} for a run of before there were manifests.

    Raises:
      RunError: if the manifest is damaged.
    """
    path = directory / MANIFEST
    if not path.exists():
        return {}
    content = read_json(path)
    files = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(files, dict) or json_checksum(files) != content.get("checksum"):
        raise RunError(f"{path} is damaged: it does not match its checksum; train again in another --workdir")
    return files


def check(directory: Path, *names: str) -> None:
    """Return if the files `names` are what was written down of them, or nothing was.

    Raises:
      RunError: if one is missing or changed.
    """
    files = recorded(directory)
    for name in names:
        if name in files and _sha256(directory / name) != files[name]:
            raise RunError(
                f"{directory / name} is damaged: its checksum is not the one in {MANIFEST}; train again in another "
                "--workdir"
            )


def _sha256(path: Path) -> str:
    try:
        require_file(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}; train again in another --workdir") from error
