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
from pspinal_jax.files import MOST_JSON_BYTES, atomic_file, differences, held, json_text, read_bytes
from pspinal_jax.recipes.settings import default_settings

_SECONDS_TO_APPEAR = 20
_LOCK = ".lock"
_LATER = {"jax"}
"""Parts of the identity that older runs do not record."""


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
            others = [entry.name for entry in entries if entry.name != _LOCK and not entry.name.endswith(".part")]
        except OSError as error:
            raise RunError(f"work directory {self.path} cannot be read: {error.strerror or error}") from error
        if others:
            raise RunError(f"{self.path} holds {others[0]} but no config.json: it is no run; choose another --workdir")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the directory, and keep other processes from training in it while in the `with`.

        Raises:
          RunError: if another process trains in it, or it cannot be written.
        """
        if not is_primary():
            yield
            return
        with contextlib.ExitStack() as opened:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                other = opened.enter_context(held(self.path / _LOCK))
            except OSError as error:
                raise RunError(f"work directory {self.path} cannot be written: {error.strerror or error}") from error
            if other is not None:
                raise RunError(
                    f"{self.path} is in use: {other} trains there; wait until it has ended, or choose another --workdir"
                )
            yield

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

    def result(self) -> dict[str, Any] | None:
        """What result.json holds; None if the run is not finished.

        Raises:
          RunError: if it is damaged.
        """
        if not self.result_path.exists():
            return None
        result = read_json(self.result_path)
        checksum = result.pop("checksum", None) if isinstance(result, dict) else ""  # older runs have none
        if checksum not in (None, json_checksum(result)):
            raise RunError(f"{self.result_path} is damaged: it does not match its checksum; train in another --workdir")
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, with its checksum; raises as `write_json`."""
        write_json(self.result_path, result | {"checksum": json_checksum(json.loads(json_text(result)))})

    def _check_same(self, config: dict[str, Any]) -> None:
        there = self.config().get("identity", {})
        later = {key: config["identity"][key] for key in _LATER & config["identity"].keys()}
        before, now = (flatten_dict(each, sep=".") for each in (later | there, config["identity"]))
        # A setting that came later than the run is at its default.
        before = {name: value for name, value in default_settings().items() if name in now} | before
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
        """The lines of metrics.jsonl; damaged ones are left out, as is a last one cut off by a kill."""
        if not self.metrics_path.is_file():
            return []
        lines = []
        for text in self.metrics_path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # no JSON, or no text
                line = json.loads(text)
                if isinstance(line, dict) and {"stage", "epoch", "step"} <= line.keys():
                    lines.append(line)
        return lines


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
      RunError: if it cannot be read or is not JSON.
    """
    try:
        return json.loads(read_bytes(path, MOST_JSON_BYTES).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}; it is damaged: train again in another --workdir") from error


def write_json(path: Path, value: Any) -> None:
    """Write the JSON value `value` to `path`, see `json_text`, whole or not at all.

    Raises:
      RunError: if it cannot be written.
    """
    write_text(path, json_text(value, indent=2) + "\n")


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
