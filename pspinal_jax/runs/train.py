"""`train`: from a recipe to a finished run directory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from pspinal_jax.checkpoints import CheckpointStore
from pspinal_jax.data import load_dataset
from pspinal_jax.data.arrays import Dataset
from pspinal_jax.errors import UsageError
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.compilation_cache import enable_compilation_cache
from pspinal_jax.runs.directory import RunDirectory, read_json, write_json
from pspinal_jax.runs.options import RunOptions
from pspinal_jax.runs.plots import plot_curves
from pspinal_jax.runs.restore import load_variables
from pspinal_jax.runs.results import make_result
from pspinal_jax.runs.setup import set_up, split_examples
from pspinal_jax.runs.signals import StopRequest
from pspinal_jax.runs.tensorboard import check_installed, write_events
from pspinal_jax.runs.trainer import Trainer
from pspinal_jax.runs.versions import device, versions


def train(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Run `recipe`, or what is left of it, in its run directory, and return what result.json holds.

    Raises:
      PSpinalError: with one line that says what is wrong and what to do.
      Stopped: after SIGINT or SIGTERM, once the run is saved.
    """
    if options.tensorboard:
        check_installed()
    enable_compilation_cache()
    directory = RunDirectory(work_directory(recipe, options))
    data = load_dataset(recipe.data)
    split_examples(recipe, data)  # what does not fit is refused before anything is written
    directory.create(_config(recipe, options, data))
    if directory.result_path.exists():
        return read_json(directory.result_path)
    setup = set_up(recipe, data)
    params = None if options.init_from is None else _start_params(options.init_from, setup.model)
    with StopRequest() as stop, CheckpointStore(directory.checkpoints_path) as store:
        trainer = Trainer(setup, directory, store, stop, options.checkpoint_seconds, params)
        trainer.run()
        result = make_result(trainer)
    lines = directory.metrics()
    plot_curves(lines, directory.curves_path, f"{recipe.card.name} ({recipe.model.head} head)")
    if options.tensorboard:
        write_events(lines, directory.path / "tensorboard")
    write_json(directory.result_path, result)
    return result


def work_directory(recipe: Recipe, options: RunOptions) -> Path:
    """The run directory: --workdir, or runs/ and the recipe's name."""
    return (options.workdir or Path("runs") / recipe.card.name).expanduser()


def _config(recipe: Recipe, options: RunOptions, data: Dataset) -> dict[str, Any]:
    """config.json. Its 'identity' decides the result and must not change when the run is resumed."""
    settings = dataclasses.asdict(recipe)
    settings["card"] = {"name": recipe.card.name}
    where = {key: str(settings["data"].pop(key)) for key in ("path", "data_dir")}
    return {
        "identity": {
            **settings,
            "init_from": None if options.init_from is None else str(options.init_from.resolve()),
            "data_fingerprint": data.fingerprint(),
        },
        "num_seeds": recipe.num_seeds,
        "class_names": list(data.class_names),
        "input_shape": list(data.train.inputs.shape[1:]),
        "input_dtype": str(data.train.inputs.dtype),
        "data_source": data.source,
        "data_location": where,
        "device": device(),
        "versions": versions(),
    }


def _start_params(run: Path, model: Any) -> Any:
    variables, config = load_variables(run)
    inputs = jax.ShapeDtypeStruct((2, *config["input_shape"]), config["input_dtype"])
    expected = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), inputs)["params"]
    there, here = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
        for leaves in (jax.tree.leaves_with_path(variables["params"]), jax.tree.leaves_with_path(expected))
    )
    if there != here:
        names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
        listed = ", ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in names)
        raise UsageError(f"--init-from {run} does not fit this model: {listed}")
    return variables["params"]
