"""What is finished of a comparison: a line of trials.jsonl each, so that a kill costs what was being computed."""

import base64
import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import (
    MOST_JSON_BYTES,
    check_target,
    differences,
    held,
    json_text,
    read_bytes,
    write_json,
    write_text,
)
from pspinal_jax.progress import warn

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
    def opened(self, identity: dict[str, Any], num_test: int) -> Iterator[None]:
        """Read what is there, and keep other processes out while in the `with`.

        Args:
          identity: what the lines are lines of.
          num_test: examples of a test split; a line of a seed says of each whether it was right.

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
                self._read(self.workdir / "trials.jsonl", num_test)
                with (self.workdir / "trials.jsonl").open("a", encoding="utf-8") as self._file:
                    yield
        except OSError as error:
            raise RunError(f"work directory {self.workdir} cannot be used: {error.strerror or error}") from error
        finally:
            self._file = None

    def add(self, key: Key, line: dict[str, Any]) -> None:
        """Write down a result."""
        self.lines[key] = json.loads(json_text({**key._asdict(), **line}))  # as it will be read back
        if self._file is not None:
            self._file.write(json_text(self.lines[key] | {"checksum": json_checksum(self.lines[key])}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _check(self, workdir: Path, identity: dict[str, Any]) -> None:
        there = _recorded(workdir)
        if there is None:
            _refuse_others(workdir)
            return
        now = json.loads(json.dumps(identity))
        changed = differences(there, now, lambda name, was, is_now: f"{name} was {was!r} and is now {is_now!r}")
        if changed:
            raise UsageError(f"{workdir} holds another comparison: {', '.join(changed[:4])}; choose another --workdir")

    def _read(self, path: Path, num_test: int) -> None:
        """Take the lines that are whole, and drop the others from the file; a kill cuts off the last one."""
        if not path.exists():
            return
        content = read_bytes(path, MOST_LINES_BYTES).decode("utf-8", errors="replace")
        *texts, rest = content.split("\n")
        found = [(text, _parse(text, num_test)) for text in [*texts, *([rest] if rest else [])]]
        self.lines |= {key_and_line[0]: key_and_line[1] for _, key_and_line in found if key_and_line is not None}
        damaged = sum(parsed is None for _, parsed in found[: len(texts)])
        if damaged:
            warn(f"{path} has {damaged} damaged line{'s' if damaged > 1 else ''}: what was there is computed again")
        if damaged or rest:
            write_text(path, "".join(text + "\n" for text, parsed in found if parsed is not None))


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


def check_workdir(workdir: Path) -> None:
    """Return if a comparison may be written to the folder `workdir`, before any work is done.

    Raises:
      UsageError: if it holds something else.
      RunError: if it cannot be written.
    """
    check_target(workdir, "work directory", "trials.jsonl", "compare.json", "compare.md")
    if _recorded(workdir) is None:
        _refuse_others(workdir)


def _refuse_others(workdir: Path) -> None:
    """Raise UsageError if `workdir` holds anything but our own files, and parts that a kill has left."""
    entries = workdir.iterdir() if workdir.exists() else ()
    if [entry for entry in entries if entry.name not in _OURS and not entry.name.endswith(".part")]:
        raise UsageError(f"{workdir} holds something else than a comparison; choose another --workdir")


def _parse(text: str, num_test: int) -> tuple[Key, dict[str, Any]] | None:
    """What the line `text` says, or None where its checksum, which older ones lack, a type or a range is wrong."""
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError, AttributeError):
        line = json.loads(text)
        if line.pop("checksum", None) in (None, json_checksum(line)):
            key = Key(*(line[name] for name in Key._fields))
            if _fits(key, line, num_test):
                return key, line
    return None


def _fits(key: Key, line: dict[str, Any], num_test: int) -> bool:
    numbers = (key.split, key.number)
    losses = [line.get(name) for name in ("train_loss", "validation_loss")]
    fits = (
        key.kind in ("trial", "seed")
        and isinstance(key.method, str)
        and all(type(number) is int and number >= 0 for number in numbers)
        and isinstance(line["setting"], dict)
        and _within(line["validation_accuracy"], 1.0)
        and _within(line["seconds"], math.inf)
        and all(loss is None or (isinstance(loss, float) and math.isfinite(loss)) for loss in losses)
        and isinstance(line.get("finite", True), bool)
    )
    if key.kind == "trial" or not fits:
        return fits
    accuracy = line["test_accuracy"]
    return _within(accuracy, 1.0) and float(unpacked(line["test_hits"], num_test).mean()) == accuracy


def _within(value: Any, most: float) -> bool:
    return isinstance(value, float) and 0.0 <= value <= most and math.isfinite(value)


def packed(hits: np.ndarray) -> str:
    """Bools [T] as text."""
    return base64.b64encode(np.packbits(hits).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """The `count` bools that `packed` made `text` of; ValueError if it did not."""
    octets = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(octets) != -(-count // 8):
        raise ValueError(f"{len(octets)} bytes, expected those of {count} bits")
    return np.unpackbits(octets, count=count).astype(bool)
