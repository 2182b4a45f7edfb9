"""Which files of a folder can be decoded, remembered from one start to the next."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from pspinal_jax.data.photos.check import check
from pspinal_jax.data.photos.files import Files
from pspinal_jax.data.progress import progress_bar

_FORMAT = 1
_SWITCH = "PSPINAL_JAX_CACHE"  # the compilation cache's: a folder, or 'off'


class Verdict(NamedTuple):
    """What is known of a file.

    Attributes:
      size: its size in bytes when it was read.
      modified: when it had been changed last, in ns.
      crc: checksum of its bytes.
      problem: why it cannot be used, or None if it can.
    """

    size: int
    modified: int
    crc: int
    problem: str | None


Verdicts: TypeAlias = dict[str, Verdict]


def judge(root: Path, files: Sequence[str], show_progress: bool) -> Verdicts:
    """A verdict on each of `files`, paths relative to `root`; what was good and has not changed since is not read.

    The verdicts are kept in the user's cache folder ($PSPINAL_JAX_CACHE, or else $XDG_CACHE_HOME/pspinal_jax, or else
    ~/.cache/pspinal_jax), not at all with PSPINAL_JAX_CACHE=off. Where they cannot be kept, it only takes time.
    """
    stamps = {file: _stamp(root / file) for file in files}
    place = _place(root)
    known = _load(place) if place else {}
    good = {file: verdict for file, verdict in known.items() if verdict.problem is None}
    verdicts = {file: good[file] for file in files if file in good and good[file][:2] == stamps[file]}
    new = [file for file in files if file not in verdicts]
    if new:
        with progress_bar(len(new), f"check pictures in {root.name}", "picture", show_progress) as bar:
            for file, checked in zip(new, check(Files(root, new), range(len(new))), strict=True):
                verdicts[file] = Verdict(*stamps[file], checked.crc, checked.problem)
                bar.update()
        if place:
            _store(place, verdicts)
    return verdicts


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # a link to nothing, say; reading it will tell
        return (-1, -1)
    return status.st_size, status.st_mtime_ns


def _place(root: Path) -> Path | None:
    choice = os.environ.get(_SWITCH)
    if choice == "off":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(choice) if choice else home / "pspinal_jax"
    return folder / "pictures" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:32]}.json"


def _load(place: Path) -> Verdicts:
    try:
        stored = json.loads(place.read_bytes())
        if stored["format"] != _FORMAT:
            return {}
        return {file: _checked_verdict(*values) for file, values in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _checked_verdict(size: int, modified: int, crc: int, problem: str | None) -> Verdict:
    if not all(isinstance(value, int) for value in (size, modified, crc)):
        raise TypeError("not a verdict")
    return Verdict(size, modified, crc, None if problem is None else str(problem))


def _store(place: Path, verdicts: Mapping[str, Verdict]) -> None:
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    with contextlib.suppress(OSError):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"format": _FORMAT, "files": verdicts}))
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
