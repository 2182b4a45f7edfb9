"""`train`: from a recipe to a finished run directory."""

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from pspinal_jax.checkpoints import CheckpointStore
from pspinal_jax.data import load_data
from pspinal_jax.data.dataset import Dataset, Split
from pspinal_jax.data.stream import end_within_a_worker
from pspinal_jax.distributed import assert_same, broadcast_from_primary, is_primary, primary_first
from pspinal_jax.environment import (
    convolution_options,
    device,
    enable_compilation_cache,
    jax_settings,
    loop_options,
    set_jax,
    versions,
)
from pspinal_jax.errors import PSpinalError, UsageError, printable
from pspinal_jax.files import check_target, expanded
from pspinal_jax.models import build_model, with_default_preprocessing
from pspinal_jax.progress import absl_quietened, say, warn
from pspinal_jax.recipes.rules import check_settings, check_settings_for
from pspinal_jax.recipes.schema import Recipe, RunOptions
from pspinal_jax.runs.build import run_mesh, set_up, split_examples
from pspinal_jax.runs.calibration import calibrate, save_calibration
from pspinal_jax.runs.directory import MetricsWriter, RunDirectory, check_installed, load_recipe_of
from pspinal_jax.runs.report import describe_start
from pspinal_jax.runs.result import head_recipe, make_result
from pspinal_jax.runs.scores import plot_curves
from pspinal_jax.runs.seeds import can_use_processes, find_parts, seeds_of, train_in_processes, wants_processes
from pspinal_jax.runs.start import (
    START,
    cached_features,
    load_start,
    look_for_copies,
    save_start,
    start_variables,
    without_backbone,
)
from pspinal_jax.training.costs import Inspection
from pspinal_jax.training.loop import Trainer
from pspinal_jax.training.signals import Stopped, StopRequest


def train(recipe: Recipe, options: RunOptions, *, calibrates: bool = True) -> dict[str, Any]:
    """Run `recipe`, or what is left of it, in its run directory, and return the content of result.json.

    In the end the run is calibrated (see pspinal_jax.runs.calibration), unless it is a part of one: `calibrates` false.
    Where several processes have joined (pspinal_jax.distributed), every one calls this, with the same arguments.

    Raises:
      PSpinalError: with one line that says what is wrong and what to do.
      Stopped: after SIGINT or SIGTERM, once the run is saved.
    """
    end_within_a_worker()
    if options.tensorboard:
        check_installed()
    inspection = Inspection(options.profile, options.dump_hlo)
    enable_compilation_cache()
    directory = RunDirectory(work_directory(recipe, options))
    _check_apart(directory.path, recipe.data.path)
    if is_primary() and not directory.result_path.exists():
        check_target(directory.path, "work directory", directory.config_path.name, directory.metrics_path.name)
    resuming = broadcast_from_primary(directory.config_path.exists)
    recipe, data = load_examples(recipe, options, directory.config() if resuming else None)
    rows = split_examples(recipe, data)  # what does not fit is refused before anything is written
    config = run_config(recipe, options, data)
    everywhere = {**config["identity"], "mesh": config["mesh"], "workdir": str(directory.path)}
    assert_same(flatten_dict(everywhere, sep="."))
    if is_primary():
        directory.check(config)
    if broadcast_from_primary(directory.result_path.exists):
        if is_primary():
            if not directory.curves_path.exists():  # a kill came between the two
                _plot(recipe, directory)
            say(f"run in {directory.path} is already finished; skipping training")
        return directory.result() or {}
    mesh = run_mesh(recipe, resuming=resuming)
    model = build_model(recipe, data.example_shape, data.num_classes)
    kept = broadcast_from_primary((directory.path / START).exists)
    begin = {} if kept else start_variables(recipe, model, options.init_from, data)

    def start() -> dict[str, Any]:
        variables = load_start(directory)
        return without_backbone(variables) if recipe.cache_features else variables

    with directory.held(config):
        save_start(directory, begin)
        copies = look_for_copies(directory, data, rows, options.init_from) if is_primary() else {}
        if recipe.cache_features:
            features: Dataset[Any] = cached_features(
                recipe, model, load_start(directory), data, directory, options.workers
            )
            setup = set_up(head_recipe(recipe), features, options.workers, mesh)
        else:
            features, setup = data, set_up(recipe, data, options.workers, mesh)
        if is_primary():
            for line in describe_start(recipe, options.init_from, data, model, setup.stages):
                say(line)
            _warn(recipe, options, directory)
        with StopRequest() as stop:
            with (
                CheckpointStore(directory.checkpoints_path) as store,
                MetricsWriter(directory, options.tensorboard) as metrics,
            ):
                if store.empty and (find_parts(directory.path) or wants_processes(recipe, setup, options)):
                    if options.profile is not None or options.dump_hlo is not None:
                        raise UsageError(
                            "profile and dump_hlo look into this process, but the seeds train in processes of their "
                            "own; give seed_mode=loop, in another workdir"
                        )
                    train_in_processes(setup, options.checkpoint_seconds, metrics, store, stop)
                trainer = Trainer(setup, metrics, store, stop, options.checkpoint_seconds, start)
                trainer.inspection = inspection
                trainer.run()
                result = make_result(trainer, setup, directory) | {"copies": copies}
                if calibrates:
                    result["calibration"], arrays = calibrate(trainer, setup, features, recipe, options.workers)
                    save_calibration(directory, arrays)
            if is_primary():
                directory.write_result(result)
                _plot(recipe, directory)
    return result


def load_examples(
    recipe: Recipe, options: RunOptions, began: dict[str, Any] | None = None
) -> tuple[Recipe, Dataset[Split]]:
    """The recipe with all its values, and its data, found to fit each other; `began` is a run's config.json."""
    whole, classes = with_default_preprocessing(recipe), None
    if began is not None:  # a run of an earlier version goes on as it began
        together = began["identity"]["data"].get("keep_copies_together", False)
        whole = dataclasses.replace(whole, data=dataclasses.replace(whole.data, keep_copies_together=together))
        classes = began["class_names"]
    else:
        check_settings(recipe)
    data = primary_first(lambda: load_data(whole.data, classes))
    if began is None:
        check_settings_for(recipe, data.source, data.example_shape)
        if recipe.seed_mode == "processes" and recipe.num_seeds > 1 and not can_use_processes(whole, options):
            raise UsageError(
                "seed_mode is processes, expected auto, loop or vmap: processes train heads on arrays, on the CPU as "
                "one device, without init_from and patience"
            )
    if not data.in_memory and whole.protocol == "validation":
        settings = whole.data
        data = data.with_validation(settings.validation_fraction, settings.split_seed, settings.keep_copies_together)
    return whole, data


def _warn(recipe: Recipe, options: RunOptions, directory: RunDirectory) -> None:
    if recipe.freeze == "backbone" and recipe.model.weights is None and options.init_from is None:
        warn(
            "the backbone is frozen with random weights: its features were never trained; give model.weights or "
            "init_from, or leave freeze out"
        )
    began, now = directory.config()["device"]["count"], device()["count"]
    if recipe.batch_norm == "per_device" and began != now:
        warn(f"with batch_norm=per_device {now} devices give another result than {began}")


def train_part() -> None:
    """Train some seeds of a run as a run of their own, in a process that seeds.py starts.

    The command's arguments are the directory, seeds/FIRST-LAST of the whole run's, and the seconds between checkpoints.
    """
    path, seconds = Path(sys.argv[1]), float(sys.argv[2])
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    config = RunDirectory(path.parents[1]).config()
    set_jax(config["identity"].get("jax", {}))
    whole, seeds = load_recipe_of(config), seeds_of(path)
    recipe = dataclasses.replace(whole, seed=whole.seed + seeds.start, num_seeds=len(seeds), seed_mode="loop")
    try:
        with absl_quietened():
            train(recipe, RunOptions(workdir=path, checkpoint_seconds=seconds), calibrates=False)
    except (PSpinalError, Stopped, OSError, MemoryError) as error:
        sys.exit(printable(error) or type(error).__name__)


def _end_with_the_parent() -> None:
    os.read(0, 1)  # returns at the end of standard input; sys.stdin would be locked when the interpreter ends
    os._exit(1)


def _check_apart(workdir: Path, data: Path | None) -> None:
    """Raise UsageError if the run would write into the folder that it reads."""
    folder = "" if data is None else os.path.realpath(expanded(data))
    if os.path.isdir(folder) and Path(os.path.realpath(workdir)).is_relative_to(folder):
        what = "its files would become data; choose another workdir"
        raise UsageError(f"the work directory {workdir} lies inside the data, {data}: {what}")


def _plot(recipe: Recipe, directory: RunDirectory) -> None:
    plot_curves(directory.metrics(), directory.curves_path, f"{recipe.card.name} ({recipe.model.head} head)")


def work_directory(recipe: Recipe, options: RunOptions) -> Path:
    """The run directory: --workdir, or runs/ and the recipe's name."""
    return expanded(options.workdir or Path("runs") / recipe.card.name)


def run_config(recipe: Recipe, options: RunOptions, data: Dataset[Split]) -> dict[str, Any]:
    """config.json. Its 'identity' decides the result and must not change when the run is resumed."""
    settings = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))  # as it will be read back
    settings["card"] = {"name": recipe.card.name}
    platform, mesh = (
        jax.default_backend(),
        settings.pop("mesh"),
    )  # where the numbers lie, not what they are: a run may go on on other devices
    where = {}
    for key in ("path", "data_dir", "labels"):
        settings["data"].pop(key)
        path = getattr(recipe.data, key)  # absolute, to be found from whatever folder
        where[key] = str(None if path is None else expanded(path).absolute())
    return {
        "identity": {
            **settings,
            "init_from": None if options.init_from is None else str(options.init_from.resolve()),
            "data_fingerprint": data.fingerprint(),
            "jax": jax_settings(),
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
        "compiler_options": (convolution_options(platform) if recipe.model.backbone != "none" else {})
        | loop_options(platform),
        "versions": versions(),
    }
