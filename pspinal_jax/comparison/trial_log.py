"""The finished trainings of a comparison, a record each in trials.jsonl: a kill costs what was being computed."""

import contextlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import (
    atomic_file,
    check_target,
    differences,
    held,
    json_text,
    read_bytes,
    write_json,
    write_text,
)
from pspinal_jax.progress import warn
from pspinal_jax.runs.directory import read_checked

MAX_LOG_BYTES = 2**30
ADVICE = "choose another --workdir"
_BEFORE_CONFIG = {".lock", "features.npz", "features.json"}
"""What a comparison writes into its work directory before config.json."""


class Key(NamedTuple):
    """Whose a record is.

    Attributes:
      kind: 'trial', with a look at validation; 'seed', with a look at the test too; 'refit', on train and validation;
        or 'average', of several of the last two.
      split: number of the split.
      method: a row of the table.
      number: of the trial, or of the seed; of an average how many.
    """

    kind: str
    split: int
    method: str
    number: int


_REQUIRED = {*Key._fields, "setting", "validation_accuracy", "seconds"}


class TrialLog:
    """The records, by key; in `workdir`, or in memory only.

    config.json holds the identity of the comparison: the records count for one of the same data, seed and training,
    whatever its heads, trials and number of seeds.

    Attributes:
      records: what is finished.
      keep_copies_together: whether the comparison cuts no copies apart, as those of earlier versions did.
      earlier: whether it was begun by a version without refits, averages and most baselines, and goes on as it was.

    Raises:
      UsageError: if `workdir` holds something else than a comparison.
      RunError: if it cannot be written, or its config.json is damaged.
    """

    def __init__(self, workdir: Path | None) -> None:
        self.workdir, self.records = workdir, dict[Key, dict[str, Any]]()
        self._file: Any = None
        self._in_memory = dict[Key, np.ndarray]()
        self.keep_copies_together, self.earlier = True, False
        if workdir is None:
            return
        check_target(workdir, "work directory", "trials.jsonl", "compare.json", "compare.md")
        config = workdir / "config.json"
        if config.exists():
            began = read_checked(config, dict, advice=ADVICE)
            self.keep_copies_together, self.earlier = "keep_copies_together" in began, "format" not in began
        elif workdir.exists() and {p.name for p in workdir.iterdir() if p.suffix != ".part"} - _BEFORE_CONFIG:
            raise UsageError(f"{workdir} holds something else than a comparison; choose another --workdir")

    @contextlib.contextmanager
    def opened(self, identity: dict[str, Any]) -> Iterator[None]:
        """Read the finished records, and keep other processes out while in the `with`.

        Args:
          identity: of the comparison, for config.json.

        Raises:
          UsageError: if the folder holds another comparison.
          RunError: if another process compares there.
        """
        if self.workdir is None:
            yield
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        config, log = self.workdir / "config.json", self.workdir / "trials.jsonl"
        with held(self.workdir / ".lock") as other:
            if other is not None:
                raise RunError(f"{self.workdir} is in use by {other}; wait until it has ended, or choose another")
            if not config.exists():
                write_json(config, identity)
            was, now = read_checked(config, dict, advice=ADVICE), json.loads(json.dumps(identity))
            if changed := differences(was, now, lambda name, old, new: f"{name} was {old!r} and is now {new!r}"):
                raise UsageError(f"{self.workdir} holds another comparison: {', '.join(changed)}; choose another")
            if log.exists():
                self._read(log)
            with log.open("a", encoding="utf-8") as self._file:
                yield

    def add(self, key: Key, record: dict[str, Any], probabilities: np.ndarray | None = None) -> None:
        """Write down a result, and beside it the `probabilities` float16 [T, C] of the test examples."""
        if probabilities is not None:
            record = record | {"probabilities": self._keep(key, probabilities)}
        self.records[key] = json.loads(json_text({**key._asdict(), **record}))  # as it will be read back
        if self.workdir is not None:
            self._file.write(json_text(self.records[key] | {"checksum": json_checksum(self.records[key])}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _keep(self, key: Key, probabilities: np.ndarray) -> str:
        """Keep an array, and give the checksum of its file."""
        np.save(content := io.BytesIO(), probabilities)
        if self.workdir is None:
            self._in_memory[key] = probabilities
        else:
            self._path(key).parent.mkdir(exist_ok=True)
            with atomic_file(self._path(key)) as part:
                part.write_bytes(content.getvalue())
        return f"{zlib.crc32(content.getvalue()):08x}"

    def _path(self, key: Key) -> Path:
        assert self.workdir is not None
        return self.workdir / "probabilities" / f"{key.kind}-{key.split}-{key.method}-{key.number}.npy"

    def probabilities(self, key: Key) -> np.ndarray | None:
        """What was added with a record, float16 [T, C]; None where it is missing or damaged."""
        if self.workdir is None:
            return self._in_memory.get(key)
        with contextlib.suppress(OSError, KeyError):
            content = read_bytes(self._path(key), MAX_LOG_BYTES)
            if f"{zlib.crc32(content):08x}" == self.records[key].get("probabilities"):
                return np.asarray(np.load(io.BytesIO(content)))
        return None

    def _read(self, path: Path) -> None:
        """Take the records that are whole, and drop the others from the file; a kill cuts off the last one."""
        lines = read_bytes(path, MAX_LOG_BYTES).decode("utf-8", errors="replace").splitlines()
        records = [parse_record(line) for line in lines]
        self.records |= {Key(*(record[name] for name in Key._fields)): record for record in records if record}
        if damaged := records.count(None):
            warn(f"{path}: damaged lines, {damaged} of {len(lines)}, are computed again")
        write_text(path, "".join(f"{line}\n" for line, record in zip(lines, records, strict=True) if record))


def parse_record(line: str) -> dict[str, Any] | None:
    """The record in a line, or None where it lacks a field or does not match its checksum; older ones have none."""
    with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
        record: dict[str, Any] = json.loads(line)
        checksum = record.pop("checksum", None)
        if record.keys() >= _REQUIRED and checksum in (None, json_checksum(record)):
            return record
    return None
