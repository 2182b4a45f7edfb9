"""What is finished of a comparison: a line of trials.jsonl each, so that a kill costs what was being computed."""

import base64
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import MOST_JSON_BYTES, differences, held, json_text, read_bytes, write_json, write_text

MOST_LINES_BYTES = 2**30


class Key(NamedTuple):
    """Whose a line is.

    Attributes:
      kind: 'trial', with a look at validation, or 'seed', with a look at the test too.
      split: number of the split.
      method: a head or a floor.
      number: of the trial, or of the seed.
    """

    kind: str
    split: int
    method: str
    number: int


class Ledger:
    """The lines, by key; in `workdir`, or in memory only.

    config.json tells what they are lines of: they count for a comparison of the same data, seed and training, whatever
    its heads, trials and number of seeds.
    """

    def __init__(self, workdir: Path | None) -> None:
        self.workdir = workdir
        self.lines: dict[Key, dict[str, Any]] = {}
        self._file: Any = None

    @contextlib.contextmanager
    def opened(self, identity: dict[str, Any]) -> Iterator[None]:
        """Read what is there, and keep other processes out while in the `with`.

        Raises:
          UsageError: if the folder holds another comparison, or something else.
          RunError: if it cannot be read or written, or another process compares there.
        """
        if self.workdir is None:
            yield
            return
        try:
            self._check(self.workdir, identity)
            self.workdir.mkdir(parents=True, exist_ok=True)
            with held(self.workdir / ".lock") as other:
                if other is not None:
                    raise RunError(
                        f"{self.workdir} is in use: {other} compares there; wait until it has ended, or choose another "
                        "--workdir"
                    )
                if not (self.workdir / "config.json").exists():
                    write_json(self.workdir / "config.json", identity)
                self._read(self.workdir / "trials.jsonl")
                with (self.workdir / "trials.jsonl").open("a", encoding="utf-8") as self._file:
                    yield
        except OSError as error:
            raise RunError(f"work directory {self.workdir} cannot be used: {error.strerror or error}") from error
        finally:
            self._file = None

    def add(self, key: Key, line: dict[str, Any]) -> None:
        """Write down a result."""
        self.lines[key] = {**key._asdict(), **line}
        if self._file is not None:
            self._file.write(json_text(self.lines[key]) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _check(self, workdir: Path, identity: dict[str, Any]) -> None:
        there = _recorded(workdir)
        if there is None:
            if workdir.exists() and [entry for entry in workdir.iterdir() if entry.name not in _OURS]:
                raise UsageError(f"{workdir} holds something else than a comparison; choose another --workdir")
            return
        now = json.loads(json.dumps(identity))
        changed = differences(there, now, lambda name, was, is_now: f"{name} was {was!r} and is now {is_now!r}")
        if changed:
            raise UsageError(f"{workdir} holds another comparison: {', '.join(changed[:4])}; choose another --workdir")

    def _read(self, path: Path) -> None:
        """Take the lines that are whole, and drop the others from the file: a kill cuts off the last."""
        if not path.exists():
            return
        texts, kept = read_bytes(path, MOST_LINES_BYTES).decode("utf-8", errors="replace").splitlines(), []
        for text in texts:
            with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
                line = json.loads(text)
                key = Key(*(line[name] for name in Key._fields))
                if isinstance(line["validation_accuracy"], float) and isinstance(line["setting"], dict):
                    self.lines[key] = line
                    kept.append(text)
        if len(kept) < len(texts):
            write_text(path, "".join(text + "\n" for text in kept))


def _recorded(workdir: Path) -> dict[str, Any] | None:
    """What decides the lines of the comparison in `workdir`; None where there is none.

    Raises:
      RunError: if its config.json is damaged.
    """
    config = workdir / "config.json"
    if not config.exists():
        return None
    try:
        there = json.loads(read_bytes(config, MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{config} is damaged: {error}; choose another --workdir") from error
    if not isinstance(there, dict):
        raise RunError(f"{config} is damaged; choose another --workdir")
    return there


def keeps_copies_together(workdir: Path | None) -> bool:
    """Whether the comparison in `workdir` cuts no copies apart: not where one of an earlier version goes on."""
    there = None if workdir is None else _recorded(workdir)
    return there is None or "keep_copies_together" in there


_OURS = {".lock", "features.npz", "features.json"}


def packed(hits: np.ndarray) -> str:
    """Bools [T] as text."""
    return base64.b64encode(np.packbits(hits).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """The first `count` bools of `packed`."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))
    return bits[:count].astype(bool)
