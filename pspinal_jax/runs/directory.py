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
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from flax.traverse_util import flatten_dict

from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.data.dataset import first_names
from pspinal_jax.distributed import barrier, is_primary
from pspinal_jax.errors import RunError, UsageError, printable
from pspinal_jax.files import MOST_JSON_BYTES, atomic_file, differences, held, json_text, read_bytes
from pspinal_jax.recipes.rules import BEFORE, default_settings
from pspinal_jax.recipes.schema import OWN, DataConfig, Recipe
from pspinal_jax.recipes.typed import typed

_SECONDS_TO_APPEAR = 20
_LOCK = ".lock"
_LATER = {"jax"}
"""Parts of the identity that older runs do not record."""
_MOST_VALUES = 2**28
"""Of one example: an input of a larger shape would fill the memory."""
_MOST_METRICS_BYTES = 2**28


class _Name(TypedDict):
    name: str


class _Identity(TypedDict):
    card: _Name
    data: dict[str, Any]
    data_fingerprint: str
    jax: NotRequired[dict[str, Any]]


class _Device(TypedDict):
    platform: str
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


class _Summary(TypedDict):
    """A number of each seed."""

    mean: float
    std: float | None
    each: list[float]


class _ClassRecall(TypedDict):
    name: str
    support: int
    recall: list[float | None]


class _Result(TypedDict):
    """What is read of result.json."""

    selection: str
    test_accuracy: _Summary
    best_on_test_accuracy: NotRequired[_Summary]
    validation_accuracy: NotRequired[_Summary]
    validation_balanced_accuracy: NotRequired[_Summary]
    test_balanced_accuracy: NotRequired[_Summary]
    test_classes: NotRequired[list[_ClassRecall]]
    published_accuracy_percent: float | None
    parameters: int
    train_examples: int
    epochs: int
    seconds: float
    compile_seconds: float


class _Line(TypedDict):
    """What every line of metrics.jsonl has."""

    stage: str
    epoch: int
    step: int


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
        try:
            _check_config(config)
        except (UsageError, ValueError) as error:
            raise RunError(
                f"{self.config_path} is not what `train` writes: {error}; train in another --workdir"
            ) from error
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
        try:
            typed("it", result, _Result)
            seeds = self.config()["num_seeds"]
            for name in _Result.__annotations__:
                value = result.get(name)
                if isinstance(value, dict) and len(value["each"]) != seeds:
                    raise UsageError(f"{name} has {len(value['each'])} values, expected one of each of {seeds} seeds")
        except UsageError as error:
            raise RunError(
                f"{self.result_path} is not what `train` writes: {error}; train in another --workdir"
            ) from error
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, with its checksum; raises as `write_json`."""
        write_json(self.result_path, result | {"checksum": json_checksum(json.loads(json_text(result)))})

    def _check_same(self, config: dict[str, Any]) -> None:
        held = self.config()
        there = held["identity"]
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
        if [line.split(" was ")[0] for line in changed] == ["data_fingerprint"]:
            what = "has had examples added, removed or changed since"
            if held["class_names"] != config["class_names"]:
                what = changed_classes(held["class_names"], config["class_names"])
            raise UsageError(
                f"{self.path} holds a run on other data: {config['data_source']} {what}; put that back, or "
                "choose another --workdir"
            )
        if changed:
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise UsageError(f"{self.path} holds another run: {', '.join(changed[:4])}{more}; choose another --workdir")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; damaged ones are left out, as is a last one cut off by a kill.

        Raises:
          RunError: if it cannot be read.
        """
        if not self.metrics_path.exists():
            return []
        lines = []
        try:
            content = read_bytes(self.metrics_path, _MOST_METRICS_BYTES)
        except OSError as error:
            raise RunError(f"{self.metrics_path} cannot be read: {error.strerror or error}") from error
        for text in content.splitlines():
            with contextlib.suppress(ValueError, RecursionError, UsageError):  # no JSON, no text, or of other types
                line = typed("it", json.loads(text), _Line)
                numbers = {key: line[key] for key in line.keys() - {"stage"}}  # null for what was not finite
                typed("it", numbers, dict[str, float | list[float | None] | None])
                lines.append(line)
        return lines


def _check_config(config: dict[str, Any]) -> None:
    """Return if config.json holds what is read of it, in sizes that a run can have; else a UsageError or ValueError."""
    typed("it", config, _Config)
    recipe, shape = load_recipe_of(config), config["input_shape"]
    if recipe.num_seeds != config["num_seeds"]:
        raise UsageError(f"num_seeds is {config['num_seeds']}, but {recipe.num_seeds} in its identity")
    if recipe.data.image_size == OWN:
        raise UsageError(f"data.image_size is {OWN}, expected a number")
    side = recipe.data.side
    rank = 3 if config["input_dtype"] == "uint8" else 1
    if len(shape) != rank or min(shape) < 1 or math.prod(shape) > _MOST_VALUES or (side and shape != [side, side, 3]):
        raise UsageError(f"input_shape is {shape!r:.100}, expected the shape of one example of {config['input_dtype']}")
    if not config["class_names"]:
        raise UsageError("class_names is empty")


def load_recipe_of(config: dict[str, Any]) -> Recipe:
    """The recipe that a run's config.json records, its data location included; on the default mesh.

    Raises:
      UsageError: if it is none.
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
      UsageError: if it is none.
    """
    data = BEFORE | settings | {key: None if value == "None" else value for key, value in location.items()}
    if data.get("image_size") is not None:
        data["transposed"] = False  # which runs of earlier versions took, and dropped in training
    config: DataConfig = typed("data", data, DataConfig)
    return config


def changed_classes(before: Sequence[str], now: Sequence[str]) -> str:
    """What a data set with the classes `now` has and lacks, beside the classes `before`."""
    old, known = set(before), set(now)
    new, gone = [name for name in now if name not in old], [name for name in before if name not in known]
    parts = [
        f"{verb} the {kind}class{'es' if len(names) > 1 else ''} {first_names([printable(name) for name in names])}"
        for verb, kind, names in (("has", "new ", new), ("lacks", "", gone))
        if names
    ]
    return " and ".join(parts) or "has its classes in another order"


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
