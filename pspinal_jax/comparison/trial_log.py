"""The finished trainings of a comparison, a record each in trials.jsonl: a kill costs what was being computed."""

import base64
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import (
    MAX_JSON_BYTES,
    check_target,
    differences,
    held,
    json_text,
    read_bytes,
    write_json,
    write_text,
)
from pspinal_jax.progress import warn

MAX_LOG_BYTES = 2**30
_OURS = {".lock", "features.npz", "features.json"}


class Key(NamedTuple):
    """Whose a record is.

    Attributes:
      kind: 'trial', with a look at validation, or 'seed', with a look at the test too.
      split: number of the split.
      method: a head or a baseline.
      number: of the trial, or of the seed.
    """

    kind: str
    split: int
    method: str
    number: int


class TrialLog:
    """The records, by key; in `workdir`, or in memory only.

    config.json holds the identity of the comparison: the records count for one of the same data, seed and training,
    whatever its heads, trials and number of seeds.

    Attributes:
      records: what is finished.
      keep_copies_together: whether the comparison cuts no copies apart, as those of earlier versions did.

    Raises:
      UsageError: if `workdir` holds something else than a comparison.
      RunError: if it cannot be written, or its config.json is damaged.
    """

    def __init__(self, workdir: Path | None) -> None:
        self.workdir, self.records = workdir, dict[Key, dict[str, Any]]()
        self._file: Any = None
        self.keep_copies_together = True
        if workdir is None:
            return
        check_target(workdir, "work directory", "trials.jsonl", "compare.json", "compare.md")
        if (workdir / "config.json").exists():
            self.keep_copies_together = "keep_copies_together" in read_json_object(workdir / "config.json")
        elif workdir.exists() and any(
            entry.name not in _OURS and not entry.name.endswith(".part") for entry in workdir.iterdir()
        ):
            raise UsageError(f"{workdir} holds something else than a comparison; choose another --workdir")

    @contextlib.contextmanager
    def opened(self, identity: dict[str, Any], num_test: int) -> Iterator[None]:
        """Read the finished records, and keep other processes out while in the `with`.

        Args:
          identity: of the comparison, for config.json.
          num_test: examples of a test split; a seed's record holds for each whether it was right.

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
            changed = differences(
                read_json_object(config),
                json.loads(json.dumps(identity)),
                lambda name, old, new: f"{name} was {old!r} and is now {new!r}",
            )
            if changed:
                raise UsageError(f"{self.workdir} holds another comparison: {', '.join(changed)}; choose another")
            if log.exists():
                self._read(log, num_test)
            with log.open("a", encoding="utf-8") as self._file:
                yield

    def add(self, key: Key, record: dict[str, Any]) -> None:
        """Write down a result."""
        self.records[key] = json.loads(json_text({**key._asdict(), **record}))  # as it will be read back
        if self.workdir is not None:
            self._file.write(json_text(self.records[key] | {"checksum": json_checksum(self.records[key])}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self, path: Path, num_test: int) -> None:
        """Take the records that are whole, and drop the others from the file; a kill cuts off the last one."""
        *lines, rest = read_bytes(path, MAX_LOG_BYTES).decode("utf-8", errors="replace").split("\n")
        found = [(line, parse_record(line, num_test)) for line in lines]
        if damaged := sum(record is None for _, record in found):
            warn(f"{path}: damaged lines, {damaged} of {len(lines)}, are computed again")
        found += [(rest, parse_record(rest, num_test))] if rest else []
        whole = [(line, record) for line, record in found if record is not None]
        self.records |= {Key(*(record[name] for name in Key._fields)): record for _, record in whole}
        if damaged or rest:
            write_text(path, "".join(f"{line}\n" for line, _ in whole))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a work directory; RunError if it holds something else."""
    try:
        found = json.loads(read_bytes(path, MAX_JSON_BYTES))
        return dict(found.items())
    except (ValueError, RecursionError, AttributeError) as error:
        raise RunError(f"{path} is damaged: {error}; choose another --workdir") from error


def parse_record(line: str, num_test: int) -> dict[str, Any] | None:
    """The record in a line, or None where it does not match its checksum.

    Older records have none: their accuracies must be such, and that of the test the one of its hits.
    """
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError, AttributeError):
        record: dict[str, Any] = json.loads(line)
        checksum = record.pop("checksum", None)
        if checksum is not None:
            return record if checksum == json_checksum(record) else None
        needed = {*Key._fields, "setting", "validation_accuracy", "seconds"}
        accuracy = record.get("test_accuracy")
        right = accuracy is None or unpacked(record["test_hits"], num_test).mean() == accuracy
        if needed <= {*record} and right and 0 <= record["validation_accuracy"] <= 1:
            return record
    return None


def packed(hits: np.ndarray) -> str:
    """Bools [T] as text."""
    return base64.b64encode(np.packbits(hits).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """The `count` bools that `packed` made `text` of; ValueError if it did not."""
    octets = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(octets) != -(-count // 8):
        raise ValueError(f"{len(octets)} bytes, expected those of {count} bits")
    return np.unpackbits(octets, count=count).astype(bool)
