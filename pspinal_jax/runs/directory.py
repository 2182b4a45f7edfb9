"""The files of a run directory, written so that a kill at any moment leaves each of them whole.

Of several processes, only process 0 writes them; Orbax saves checkpoints from all.

config.json     recipe, classes, data and versions; written when the run starts, checked when it resumes
metrics.jsonl   a line an epoch
result.json     written when the run is finished
manifest.json   SHA-256 of the other files on which an answer depends
curves.png      loss and accuracy by epoch
tensorboard/    the lines of metrics.jsonl as TensorBoard's events, if asked for
checkpoints/    see pspinal_jax.checkpoints
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
from flax.traverse_util import flatten_dict

from pspinal_jax import files
from pspinal_jax.checkpoints.checksum import file_checksum, json_checksum
from pspinal_jax.data.dataset import first_names
from pspinal_jax.distributed import barrier, is_primary
from pspinal_jax.errors import RunError, UsageError, printable
from pspinal_jax.files import MAX_JSON_BYTES, atomic_file, differences, json_text, read_bytes
from pspinal_jax.progress import warn
from pspinal_jax.recipes.rules import BEFORE, default_settings
from pspinal_jax.recipes.schema import OWN, DataConfig, Recipe
from pspinal_jax.recipes.typed import typed
from pspinal_jax.training.loop import REPORT

_LOCK = ".lock"
_MAX_VALUES = 2**28  # of one example: an input of a larger shape would fill the memory
_MAX_METRICS_BYTES = 2**28
_ADVICE = "train in another workdir"


class _Identity(TypedDict):
    data: dict[str, Any]
    data_fingerprint: str


class _Device(TypedDict):
    kind: str
    count: int


class _Config(TypedDict):
    """What is read of config.json, besides the recipe in its identity."""

    identity: _Identity
    num_seeds: int
    class_names: list[str]
    input_shape: list[int]
    input_dtype: Literal["uint8", "float32"]
    columns: NotRequired[list[str]]
    data_source: str
    data_location: dict[str, str]
    device: _Device
    versions: dict[str, str | None]
    checksum: str


class _Summary(TypedDict):
    """A number of each seed."""

    mean: float
    std: float | None
    each: list[float]


class _ClassRecall(TypedDict):
    name: str
    support: int
    recall: list[float | None]


class _Calibration(TypedDict):
    """What is read of it; the rest is there where `reason`, why there is none, is empty."""

    reason: str
    examples: int
    accept: NotRequired[float]
    temperature: NotRequired[list[float]]
    threshold: NotRequired[list[float]]
    calibration_error: NotRequired[dict[str, list[float]]]


class _Result(TypedDict):
    """What is read of result.json."""

    selection: str
    test_accuracy: _Summary
    best_on_test_accuracy: NotRequired[_Summary]
    test_balanced_accuracy: NotRequired[_Summary]
    test_classes: NotRequired[list[_ClassRecall]]
    published_accuracy_percent: float | None
    parameters: int
    train_examples: int
    epochs: int
    seconds: float
    compile_seconds: float
    calibration: NotRequired[_Calibration]


_SUMMARIES = (_Summary, NotRequired[_Summary])


class _Manifest(TypedDict):
    sha256: dict[str, str]


class _Line(TypedDict):
    """What every line of metrics.jsonl has."""

    stage: str
    epoch: int
    step: int


def read_checked(
    path: Path,
    schema: Any,
    check: Callable[[dict[str, Any]], None] = lambda value: None,
    advice: str = _ADVICE,
    covers: str | None = None,
) -> dict[str, Any]:
    """The JSON object in `path`, of which the checksum, the types and what `check` looks at are right.

    Args:
      path: a file of `write_checked`; older ones have no checksum.
      schema: the TypedDict of what is read of it.
      check: raises UsageError or ValueError for values that cannot be.
      advice: how to go on without the file.
      covers: the entry that the checksum is of, by default all of them.

    Raises:
      RunError: if it cannot be read or is damaged.
    """
    try:
        value = json.loads(read_bytes(path, MAX_JSON_BYTES).decode())
        typed("it", value, schema)
        checksum = value.pop("checksum", None)
        if checksum not in (None, json_checksum(value if covers is None else value[covers])):
            raise ValueError("it does not match its checksum")
        check(value)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, UsageError) as error:
        raise RunError(f"{path} is damaged: {error}; {advice}") from error
    return dict(value)


def write_checked(path: Path, value: dict[str, Any], covers: str | None = None) -> None:
    """Write the JSON object `value` to `path` with its checksum; raises as `write_json`. See `read_checked`."""
    plain = json.loads(json_text(value))  # as it will be read back
    write_json(path, plain | {"checksum": json_checksum(plain if covers is None else plain[covers])})


class RunDirectory:
    """The paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.json"
        self.metrics_path = path / "metrics.jsonl"
        self.result_path = path / "result.json"
        self.manifest_path = path / "manifest.json"
        self.curves_path = path / "curves.png"
        self.checkpoints_path = path / "checkpoints"

    def check(self, config: dict[str, Any]) -> None:
        """Check that a run of `config` may start or go on here; writes nothing.

        Raises:
          RunError: if the directory cannot be read, or holds other files than a run's.
          UsageError: if it holds a run of another configuration; the differences are named.
        """
        try:
            names = [path.name for path in self.path.iterdir()] if self.path.exists() else []
        except OSError as error:
            raise RunError(f"work directory {self.path} cannot be read: {error.strerror or error}") from error
        others = [name for name in names if name != _LOCK and not name.endswith(".part")]
        if self.config_path.name in others:
            self._check_same(config)
        elif others:
            raise RunError(f"{self.path} holds {others[0]} but no config.json: it is not a run; choose another workdir")

    def _check_same(self, config: dict[str, Any]) -> None:
        held, identity = self.config(), config["identity"]
        # Runs of earlier versions do not record JAX's settings.
        before, now = (flatten_dict({"jax": identity["jax"]} | each, sep=".") for each in (held["identity"], identity))
        # A setting that came later than the run is at its default.
        before = {name: value for name, value in default_settings().items() if name in now} | before
        changed = differences(before, now, lambda key, was, is_now: f"{key} was {was!r} and is now {is_now!r}")
        if not changed:
            return
        changed.sort(key=lambda line: not line.startswith("card.name"))
        what = f"another run: {', '.join(changed[:4])}"
        if len(changed) == 1 and changed[0].startswith("data_fingerprint"):
            what = f"a run on other data: {config['data_source']} has had examples added, removed or changed"
            if held["class_names"] != config["class_names"]:
                classes = changed_classes(held["class_names"], config["class_names"])
                what = f"a run on other data: {config['data_source']} {classes}"
        raise UsageError(f"{self.path} holds {what}; choose another workdir")

    @contextlib.contextmanager
    def held(self, config: dict[str, Any]) -> Iterator[None]:
        """Make the directory for a run of `config`, unless it holds that run already, and keep other processes out.

        Raises:
          RunError: if another process trains in it, it cannot be written, or process 0 writes to another file system.
          UsageError: as `check`.
        """
        with contextlib.ExitStack() as opened:
            if is_primary():
                with writing(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                    other = opened.enter_context(files.held(self.path / _LOCK))
                if other is not None:
                    raise RunError(f"{self.path} is in use: {other} trains there; wait, or choose another workdir")
                self.check(config)
                if not self.config_path.exists():
                    write_checked(self.config_path, config)
            barrier()
            if not self.config_path.exists():
                raise RunError(f"{self.config_path}, which process 0 has written, is missing; workdir must be shared")
            yield

    def config(self) -> dict[str, Any]:
        """The configuration of the run in this directory.

        Raises:
          RunError: if there is none, or it is damaged.
        """
        if not self.config_path.is_file():
            raise RunError(f"{self.path} is not a run directory: it has no config.json; give the workdir of a `train`")
        return read_checked(self.config_path, _Config, _check_config)

    def result(self) -> dict[str, Any] | None:
        """The content of result.json; None if the run is not finished.

        Raises:
          RunError: if it is damaged.
        """
        seeds = self.config()["num_seeds"]
        if not self.result_path.exists():
            return None

        def check(result: dict[str, Any]) -> None:
            for name, value in result.items():
                if _Result.__annotations__.get(name) in _SUMMARIES and len(value["each"]) != seeds:
                    raise UsageError(f"{name} has {len(value['each'])} values, expected one for each of {seeds} seeds")

        return read_checked(self.result_path, _Result, check)

    def finished_result(self) -> dict[str, Any]:
        """The content of result.json; raises as `result`.

        Raises:
          RunError: if the run is not finished.
        """
        if (result := self.result()) is None:
            raise RunError(f"{self.path} is not finished: it has no result.json; run `train` again to resume it")
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json; raises as `write_json`."""
        write_checked(self.result_path, result)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; damaged ones are left out, as is a last one cut off by a kill.

        Raises:
          RunError: if it cannot be read.
        """
        if not self.metrics_path.exists():
            return []
        lines = []
        try:
            content = read_bytes(self.metrics_path, _MAX_METRICS_BYTES)
        except OSError as error:
            raise RunError(f"{self.metrics_path} cannot be read: {error.strerror or error}") from error
        for text in content.splitlines():
            with contextlib.suppress(ValueError, RecursionError, UsageError):  # no JSON, no text, or of other types
                line = typed("it", json.loads(text), _Line)
                numbers = {key: line[key] for key in line.keys() - {"stage"}}  # null for what was not finite
                typed("it", numbers, dict[str, float | list[float | None] | None])
                lines.append(line)
        return lines

    def recorded(self) -> dict[str, str]:
        """SHA-256 by the name of every file in the manifest; {} for a run without one.

        Raises:
          RunError: if the manifest is damaged.
        """
        if not self.manifest_path.exists():
            return {}
        return dict(read_checked(self.manifest_path, _Manifest, covers="sha256")["sha256"])

    def record(self, *names: str) -> None:
        """Add the files `names`, as they are now, to the manifest.

        Raises:
          RunError: if the manifest cannot be written.
          OSError: if a file cannot be read.
        """
        known = self.recorded() | {name: file_checksum(self.path / name) for name in names}
        write_checked(self.manifest_path, {"sha256": known}, covers="sha256")

    def verify(self, *names: str) -> None:
        """Return if the files `names` are as the manifest records them, or it does not; raises as `verify_files`."""
        known = self.recorded()
        verify_files(self.path, known, [name for name in names if name in known], _ADVICE)


def verify_files(folder: Path, sha256: dict[str, str], names: Iterable[str], advice: str) -> None:
    """Check that the files `names` in `folder` have these checksums, by name.

    Raises:
      RunError: if one is missing or changed; it ends with `advice`.
    """
    for name in names:
        try:
            found = file_checksum(folder / name)
        except OSError as error:
            raise RunError(f"{folder / name} cannot be read: {error.strerror or error}; {advice}") from error
        if found != sha256.get(name):
            raise RunError(f"{folder / name} is damaged: it does not match its checksum; {advice}")


def _check_config(config: dict[str, Any]) -> None:
    """Raise UsageError or ValueError where sizes are not those of a run."""
    recipe, shape = load_recipe_of(config), config["input_shape"]
    if recipe.num_seeds != config["num_seeds"]:
        raise UsageError(f"num_seeds is {config['num_seeds']}, but {recipe.num_seeds} in its identity")
    if recipe.data.image_size == OWN:
        raise UsageError(f"data.image_size is {OWN}, expected a number")
    side = recipe.data.side
    rank = 3 if config["input_dtype"] == "uint8" else 1
    if len(shape) != rank or min(shape) < 1 or math.prod(shape) > _MAX_VALUES or (side and shape != [side, side, 3]):
        raise UsageError(f"input_shape is {shape!r:.100}, expected the shape of one example of {config['input_dtype']}")
    if not config["class_names"]:
        raise UsageError("class_names is empty")


def load_recipe_of(config: dict[str, Any]) -> Recipe:
    """The recipe that a run's config.json records, its data location included; on the default mesh.

    Raises:
      UsageError: if it is not a recipe.
    """
    settings = config["identity"]
    # A setting that came later than the run is at its default.
    given = {name: settings[name] for name in Recipe.__dataclass_fields__ if name in settings and name != "mesh"}
    given["card"] = {"name": settings["card"]["name"], "row": "", "model": ""}
    given["data"] = data_config(settings["data"], config["data_location"])
    recipe: Recipe = typed("identity", given, Recipe)
    return recipe


def data_config(settings: dict[str, Any], location: dict[str, str]) -> DataConfig:
    """The data configuration that config.json records as these settings, at this location.

    Raises:
      UsageError: if it is not one.
    """
    data = BEFORE | settings | {key: None if value == "None" else value for key, value in location.items()}
    if data.get("image_size") is not None:
        data["transposed"] = False  # which runs of earlier versions took, and dropped in training
    config: DataConfig = typed("data", data, DataConfig)
    return config


def changed_classes(before: Sequence[str], now: Sequence[str]) -> str:
    """How a data set with the classes `now` differs from the classes `before`."""
    for verb, names, others in (("has the new classes", now, before), ("lacks the classes", before, now)):
        if rest := [printable(name) for name in names if name not in set(others)]:
            return f"{verb} {first_names(rest)}"
    return "has its classes in another order"


def write_json(path: Path, value: Any) -> None:
    """Write the JSON value `value` to `path`, see `json_text`, whole or not at all.

    Raises:
      RunError: if it cannot be written.
    """
    with writing(path):
        files.write_json(path, value)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which it replaces at the end of the `with`.

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


class MetricsWriter:
    """Writes an epoch's line as the epoch ends: to metrics.jsonl and, if asked for, as TensorBoard events.

    Use in a `with`. Of several processes only process 0 writes. The events are scalars by step, a curve for each stage,
    and of several seeds their mean; they are always those of the lines in metrics.jsonl, whatever was resumed.

    Attributes:
      directory: where they are written.
    """

    def __init__(self, directory: RunDirectory, tensorboard: bool = False) -> None:
        self.directory = directory
        self._events = _Events(directory.path / "tensorboard") if tensorboard and is_primary() else None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._events is not None:
            self._events.close()

    def rewind(self, finished: Sequence[tuple[str, int]]) -> None:
        """Keep the lines of `finished`, the (stage, epoch) that the restored checkpoint knows; warn of missing ones.

        Raises:
          RunError: if it cannot be written.
        """
        if not is_primary():
            return
        path = self.directory.metrics_path
        known = {(line["stage"], line["epoch"]): line for line in reversed(self.directory.metrics())}
        lines = [known[epoch] for epoch in finished if epoch in known]
        if missing := [f"{stage} {epoch}" for stage, epoch in finished if (stage, epoch) not in known]:
            warn(
                f"{path} is damaged: it lacks the lines of finished epochs ({', '.join(missing[:5])}); the run goes "
                "on, and its result does not depend on them"
            )
        with whole_file(path) as part:
            part.write_text("".join(json_text(line) + "\n" for line in lines))
        if self._events is not None:
            self._events.restart(lines)

    def report(self, found: dict[str, Any]) -> Path:
        """Write what is known of a step that was not finite, and say where; raises as `rewind`."""
        path = self.directory.path / REPORT
        if is_primary():
            write_json(path, found)
        return path

    def append(self, line: dict[str, Any]) -> None:
        """Add one line; raises as `rewind`."""
        if not is_primary():
            return
        path = self.directory.metrics_path
        with writing(path), path.open("a") as file:
            file.write(json_text(line) + "\n")
        if self._events is not None:
            self._events.add(line)


class _Events:
    """TensorBoard's files, a folder for each stage.

    By tensorboardX's file writer: its SummaryWriter writes in a thread, so a flush may miss lines and an error is lost.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writers: dict[str, Any] = {}

    def restart(self, lines: list[dict[str, Any]]) -> None:
        """Begin anew with `lines`."""
        self.close()
        with writing(self._path):
            for old in self._path.glob("*/events.out.tfevents.*"):
                old.unlink()
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Write a line as scalars, of several seeds their mean."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        folder, now = self._path / line["stage"], time.time()
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            if line["stage"] not in self._writers:
                self._writers[line["stage"]] = EventsWriter(str((folder / "events").absolute()))
            writer = self._writers[line["stage"]]
            for name in line.keys() - {"stage", "step"}:
                value = scalar(name, float(np.mean(np.asarray(line[name], float))))
                writer.write_event(Event(step=line["step"], wall_time=now, summary=value))
            writer.flush()

    def close(self) -> None:
        """Close the files; every line was flushed as it was added."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        self._writers = {}


def check_installed() -> None:
    """Raise UsageError, naming the extra, where tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UsageError("tensorboard needs tensorboardX; in the checkout: pip install '.[tensorboard]'") from None
