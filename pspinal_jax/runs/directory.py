"""The files of a run directory, written so that a kill at any moment leaves each of them whole.

Of several processes, only process 0 writes them; Orbax saves checkpoints from all.

config.json     recipe, classes, data and versions; written when the run starts, checked when it resumes
metrics.jsonl   a line an epoch
result.json     written when the run is finished
curves.png      loss and accuracy by epoch
checkpoints/    see pspinal_jax.checkpoints
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.distributed.coordination import barrier, is_primary
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import atomic_file, differences

_SECONDS_TO_APPEAR = 20


class RunDirectory:
    """The paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.json"
        self.metrics_path = path / "metrics.jsonl"
        self.result_path = path / "result.json"
        self.curves_path = path / "curves.png"
        self.checkpoints_path = path / "checkpoints"

    def check(self, config: dict[str, Any]) -> None:
        """Check that a run of `config` may start or go on here; writes nothing.

        Raises:
          RunError: if the directory cannot be read, or holds other files than a run's.
          UsageError: if it holds a run of another configuration; the differences are named.
        """
        try:
            if self.config_path.exists():
                self._check_same(config)
                return
            entries = self.path.iterdir() if self.path.exists() else ()
            others = [entry.name for entry in entries if not entry.name.endswith(".part")]
        except OSError as error:
            raise RunError(f"work directory {self.path} cannot be read: {error.strerror or error}") from error
        if others:
            raise RunError(f"{self.path} holds {others[0]} but no config.json: it is no run; choose another --workdir")

    def create(self, config: dict[str, Any]) -> None:
        """Make the directory for a run of `config` unless it holds that run already; raises as `check`.

        Raises:
          RunError: if it cannot be written.
        """
        if is_primary():
            self._create(config)
        barrier()
        if not is_primary() and not self._appears():
            raise RunError(
                f"{self.config_path}, which process 0 has written, is not to be seen from this process; --workdir must "
                "lie on a file system that all machines share"
            )

    def _create(self, config: dict[str, Any]) -> None:
        self.check(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            there = self.config_path.exists()
        except OSError as error:
            raise RunError(f"work directory {self.path} cannot be written: {error.strerror or error}") from error
        if not there:
            write_json(self.config_path, config | {"checksum": json_checksum(config)})

    def _appears(self) -> bool:
        """Whether config.json is there, or comes to be: a network file system may take its time."""
        for _ in range(_SECONDS_TO_APPEAR):
            if self.config_path.exists():
                return True
            time.sleep(1)
        return self.config_path.exists()

    def config(self) -> dict[str, Any]:
        """The configuration of the run in this directory.

        Raises:
          RunError: if there is none, or it is damaged.
        """
        if not self.config_path.is_file():
            raise RunError(f"{self.path} is no run directory: it has no config.json; give the --workdir of a `train`")
        config = read_json(self.config_path)
        checksum = config.pop("checksum", None) if isinstance(config, dict) else None
        if checksum != json_checksum(config):
            raise RunError(f"{self.config_path} does not match its checksum: it is damaged; train in another --workdir")
        return config

    def _check_same(self, config: dict[str, Any]) -> None:
        there = self.config()
        before, now = (flatten_dict(each.get("identity", {}), sep=".") for each in (there, config))
        name = before.get("card.name")
        if name != now.get("card.name"):
            raise UsageError(
                f"{self.path} holds a run of the recipe {name}, not {now.get('card.name')}; choose another --workdir"
            )
        changed = differences(before, now, lambda key, was, is_now: f"{key} was {was!r} and is now {is_now!r}")
        if changed:
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise UsageError(f"{self.path} holds another run: {', '.join(changed[:4])}{more}; choose another --workdir")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut off by a kill is left out."""
        if not self.metrics_path.is_file():
            return []
        lines = []
        for text in self.metrics_path.read_bytes().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # no JSON, or no text
                break
        return lines


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
      RunError: if it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, whole or not at all.

    Raises:
      RunError: if it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all; raises as `write_json`."""
    with whole_file(path) as part:
        part.write_text(text)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what shall be at `path`, whole or not at all: it is moved there at the end of the `with`.

    Raises:
      RunError: if it cannot be written; what was at `path` stays.
    """
    with writing(path), atomic_file(path) as part:
        yield part


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """In a `with`, an error of the operating system becomes a RunError that names `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}; put that right and run the same command again: "
            "what was written before is kept"
        ) from error
