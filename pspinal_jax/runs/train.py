"""`train`: from a recipe to a finished run directory."""

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from pspinal_jax.checkpoints import CheckpointStore
from pspinal_jax.data import load_data
from pspinal_jax.data.dataset import Dataset, Split
from pspinal_jax.data.stream import end_within_a_worker
from pspinal_jax.distributed import assert_same, broadcast_from_primary, is_primary, primary_first
from pspinal_jax.environment import convolution_options, device, enable_compilation_cache, versions
from pspinal_jax.errors import PSpinalError, UsageError, printable
from pspinal_jax.files import check_target, expanded
from pspinal_jax.log_filter import absl_quietened
from pspinal_jax.models import Classifier, build_model, with_default_preprocessing
from pspinal_jax.progress import say, warn
from pspinal_jax.recipes.rules import check_settings, check_settings_for
from pspinal_jax.recipes.schema import Recipe, RunOptions
from pspinal_jax.runs.build import RunSetup, set_up, split_examples
from pspinal_jax.runs.directory import RunDirectory, load_recipe_of
from pspinal_jax.runs.features import cached_features, head_of, head_recipe
from pspinal_jax.runs.metrics import MetricsWriter, check_installed, plot_curves
from pspinal_jax.runs.opening import describe_opening, warn_of_random_backbone
from pspinal_jax.runs.programs import run_mesh
from pspinal_jax.runs.restore import keep_start, start_variables
from pspinal_jax.runs.result import make_result
from pspinal_jax.runs.seeds import can_use_processes, find_parts, seeds_of, train_in_processes, wants_processes
from pspinal_jax.runs.seen import keep_seen, read_seen
from pspinal_jax.training.loop import Trainer
from pspinal_jax.training.signals import Stopped, StopRequest

_DECIDING = (
    "default_prng_impl",
    "threefry_partitionable",
    "random_seed_offset",
    "enable_x64",
    "default_matmul_precision",
)
"""JAX's settings with which the same run gives other numbers."""


def train(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Run `recipe`, or what is left of it, in its run directory, and return what result.json holds.

    Where several processes have joined (pspinal_jax.distributed), every one calls this, with the same arguments.

    Raises:
      PSpinalError: with one line that says what is wrong and what to do.
      Stopped: after SIGINT or SIGTERM, once the run is saved.
    """
    end_within_a_worker()
    if options.tensorboard:
        check_installed()
    asked, recipe = recipe, with_default_preprocessing(recipe)
    enable_compilation_cache()
    directory = RunDirectory(work_directory(recipe, options))
    _check_apart(directory.path, recipe.data.path)
    if is_primary() and not directory.result_path.exists():
        check_target(directory.path, "work directory", directory.config_path.name, directory.metrics_path.name)
    resuming = broadcast_from_primary(directory.config_path.exists)
    if resuming:  # a run of an earlier version goes on as it began
        began = directory.config().get("identity", {}).get("data", {}).get("keep_copies_together", False)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, keep_copies_together=began))
    else:
        check_settings(asked)
    classes = directory.config()["class_names"] if resuming else None
    data = primary_first(lambda: load_data(recipe.data, classes))
    if not resuming:
        check_settings_for(asked, data.source, data.example_shape)
        _check_seed_mode(recipe, options)
    if not data.in_memory and recipe.protocol == "validation":
        together = recipe.data.keep_copies_together
        data = data.with_validation(recipe.data.validation_fraction, recipe.data.split_seed, together)
    rows = split_examples(recipe, data)  # what does not fit is refused before anything is written
    config = _config(recipe, options, data)
    everywhere = {**config["identity"], "mesh": config["mesh"], "workdir": str(directory.path)}
    assert_same(flatten_dict(everywhere, sep="."))
    if is_primary():
        directory.check(config)
    if broadcast_from_primary(directory.result_path.exists):
        if is_primary() and not directory.curves_path.exists():  # a kill came between the two
            _plot(recipe, directory)
        if is_primary():
            say(f"{directory.path} holds this run, finished: nothing is trained again; its result:")
        return directory.result() or {}
    mesh = run_mesh(recipe, resuming=resuming)
    if resuming:
        _warn_of_devices(recipe, directory)
    shape, dtype = data.example_shape, data.example_dtype
    model = build_model(recipe, shape, data.num_classes)

    def read_given() -> dict[str, Any]:
        return start_variables(recipe, model, options.init_from, shape, dtype, data.class_names)

    given = None if resuming else read_given()
    with directory.held():
        directory.create(config)
        start = keep_start(directory, given, read_given)
        copies = _look_for_copies(directory, data, rows, options.init_from) if is_primary() else {}
        if not data.in_memory and recipe.cache_features:
            features = cached_features(recipe, model, start, data, directory, options.workers)
            head_only, start = head_recipe(recipe), partial(head_of, start)
            head = build_model(head_only, features.example_shape, features.num_classes)
            setup = set_up(head_only, head, features, options.workers, mesh)
        else:
            setup = set_up(recipe, model, data, options.workers, mesh)
        if is_primary():
            _open(recipe, options, data, model, setup)
        return _train(setup, recipe, options, directory, start, copies)


def _train(
    setup: RunSetup,
    recipe: Recipe,
    options: RunOptions,
    directory: RunDirectory,
    start: Callable[[], dict[str, Any]],
    copies: dict[str, int],
) -> dict[str, Any]:
    with StopRequest() as stop:
        with (
            CheckpointStore(directory.checkpoints_path) as store,
            MetricsWriter(directory, options.tensorboard) as metrics,
        ):
            if store.empty and (find_parts(directory.path) or wants_processes(recipe, setup, options)):
                train_in_processes(setup, options.checkpoint_seconds, metrics, store, stop)
            trainer = Trainer(setup, metrics, store, stop, options.checkpoint_seconds, start)
            trainer.run()
            result = make_result(trainer, setup, directory) | {"copies": copies}
        if is_primary():
            directory.write_result(result)
            _plot(recipe, directory)
    return result


def train_part() -> None:
    """The process of some seeds of a run, see seeds.py: trains them as a run of their own.

    The command's arguments are the directory, seeds/FIRST-LAST of the whole run's, and the seconds between checkpoints.
    """
    path, seconds = Path(sys.argv[1]), float(sys.argv[2])
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    config = RunDirectory(path.parents[1]).config()
    for name, value in config["identity"].get("jax", {}).items():
        jax.config.update(f"jax_{name}", value)
    whole, seeds = load_recipe_of(config), seeds_of(path)
    recipe = dataclasses.replace(whole, seed=whole.seed + seeds.start, num_seeds=len(seeds), seed_mode="loop")
    try:
        with absl_quietened():
            train(recipe, RunOptions(workdir=path, checkpoint_seconds=seconds))
    except (PSpinalError, Stopped, OSError, MemoryError) as error:
        sys.exit(printable(error) or type(error).__name__)


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _look_for_copies(
    directory: RunDirectory, data: Dataset[Split], rows: tuple[np.ndarray, np.ndarray], init_from: Path | None
) -> dict[str, int]:
    """Keep digests of what is trained on, and warn of test examples among it; counts for result.json."""
    contents = data.contents()
    keep_seen(directory.path, contents, rows, init_from)
    test = len(contents.labels) - len(data.test) + np.arange(len(data.test))
    counts, text = contents.find_copies(*rows, test)
    if text:
        warn(f"{data.source}: {text}")
    if init_from is not None:
        before = (read_seen(directory.path) or {}).get("before", np.zeros(0, np.uint64))
        places = test[np.isin(contents.digests[test], before)]
        counts["test_in_init_from"] = len(places)
        if len(places):
            count = f"{len(places):,} of {len(test):,} test examples are ones that {init_from} was trained on"
            warn(f"{data.source}: {count}: {contents.named(places)}")
        elif not len(before):
            warn(f"{init_from} is a run without checksums: it may have been trained on the test examples")
    return counts


def _check_seed_mode(recipe: Recipe, options: RunOptions) -> None:
    if recipe.seed_mode == "processes" and recipe.num_seeds > 1 and not can_use_processes(recipe, options):
        raise UsageError(
            "seed_mode is processes, expected auto, loop or vmap: processes train heads on arrays, on the CPU as one "
            "device, without --init-from and --patience"
        )


def _open(recipe: Recipe, options: RunOptions, data: Dataset[Split], model: Classifier, setup: RunSetup) -> None:
    """Say on standard error what is about to be trained."""
    for line in describe_opening(recipe, options.init_from, data, model, setup.stages):
        say(line)
    problem = warn_of_random_backbone(recipe, options.init_from)
    if problem is not None:
        warn(problem)


def _check_apart(workdir: Path, data: Path | None) -> None:
    """Raise UsageError if the run would write into the folder that it reads."""
    place, folder = os.path.realpath(workdir), "" if data is None else os.path.realpath(expanded(data))
    if folder and os.path.isdir(folder) and os.path.commonpath([place, folder]) == folder:
        raise UsageError(
            f"the work directory {workdir} lies inside the data, {data}: what a run writes there would become data; "
            "choose another --workdir"
        )


def _warn_of_devices(recipe: Recipe, directory: RunDirectory) -> None:
    """Say so where the rest of the run will be another than it would have been on the devices it began on."""
    began, now = directory.config()["device"]["count"], device()["count"]
    if recipe.batch_norm == "per_device" and began != now and is_primary():
        warn(f"with --batch-norm per_device {now} devices give another result than {began}")


def _plot(recipe: Recipe, directory: RunDirectory) -> None:
    plot_curves(directory.metrics(), directory.curves_path, f"{recipe.card.name} ({recipe.model.head} head)")


def work_directory(recipe: Recipe, options: RunOptions) -> Path:
    """The run directory: --workdir, or runs/ and the recipe's name."""
    return expanded(options.workdir or Path("runs") / recipe.card.name)


def _absolute(path: Path | None) -> str:
    """`path` as it will be looked up again, from whatever folder; text for what is not given, too."""
    return str(None if path is None else expanded(path).absolute())


def _config(recipe: Recipe, options: RunOptions, data: Dataset[Split]) -> dict[str, Any]:
    """config.json. Its 'identity' decides the result and must not change when the run is resumed."""
    settings = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))  # as it will be read back
    settings["card"] = {"name": recipe.card.name}
    mesh = settings.pop("mesh")  # where the numbers lie, not what they are: a run may go on on other devices
    where = {key: _absolute(getattr(recipe.data, key)) for key in ("path", "data_dir")}
    for key in where:
        settings["data"].pop(key)
    return {
        "identity": {
            **settings,
            "init_from": None if options.init_from is None else str(options.init_from.resolve()),
            "data_fingerprint": data.fingerprint(),
            "jax": {name: getattr(jax.config, f"jax_{name}", None) for name in _DECIDING},
        },
        "num_seeds": recipe.num_seeds,
        "class_names": list(data.class_names),
        "input_shape": list(data.example_shape),
        "input_dtype": str(data.example_dtype),
        "columns": list(data.columns),
        "data_source": data.source,
        "left_out": [*data.skipped, *data.passed_over],
        "data_location": where,
        "mesh": mesh,
        "device": device(),
        "compiler_options": convolution_options(jax.default_backend()) if recipe.model.backbone != "none" else {},
        "versions": versions(),
    }
