"""What a run starts from: variables, a frozen backbone's features, and digests of the examples that it sees.

start.safetensors     the variables, where they are not the seed's alone
backbone.safetensors  the backbone of a run on cached features: it runs over the data once, and the head trains on its
                      features as on any data
features.npz          these features
seen.safetensors      train, validation: digests of the run's own examples, uint64 [N], see `pspinal_jax.data.dataset`;
                      before: of those that the run given by --init-from has seen, and the ones before it
"""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pspinal_jax.data.dataset import ArraySplit, Dataset, Split, array_dataset
from pspinal_jax.data.npz import read_npz
from pspinal_jax.distributed import barrier, broadcast_from_primary, is_primary, put, whole
from pspinal_jax.environment import convolution_options, jit_with
from pspinal_jax.errors import PSpinalError, UsageError
from pspinal_jax.models import Classifier, abstract_variables
from pspinal_jax.progress import progress_bar, say, warn
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.build import augmentation
from pspinal_jax.runs.directory import RunDirectory, whole_file, writing
from pspinal_jax.runs.result import BACKBONE, load_variables, misfits
from pspinal_jax.training import keys
from pspinal_jax.training.images import process_local_batches
from pspinal_jax.training.sharding import divisible_size, fit_mesh, shard_process_local, shardings
from pspinal_jax.weights import backbone_variables
from pspinal_jax.weights.variables import read_variables, save_variables

START = "start.safetensors"
SEEN = "seen.safetensors"
FEATURES = "features.npz"
KINDS = ("train", "validation", "before")
_OUTPUT = ("head", "output")


def start_variables(recipe: Recipe, model: Classifier, init_from: Path | None, data: Dataset[Split]) -> dict[str, Any]:
    """Variables to start from, by collection; what is not in them starts from the seed.

    Args:
      recipe: may name weights for the backbone.
      model: the recipe's.
      init_from: run directory whose selected parameters and running statistics are taken, those of the output layer
        only where the classes are the same; they go before the weights.
      data: gives the shape of the inputs, and the classes.

    Raises:
      PSpinalError: if something cannot be read, or does not fit the model.
    """
    if init_from is None:
        weights = recipe.model.weights
        backbone = {} if weights is None else backbone_variables(recipe.model.backbone, weights)
        return {collection: {"backbone": tree} for collection, tree in backbone.items()}
    variables, config, _ = load_variables(init_from)
    others = config["class_names"] != list(data.class_names)

    def kept(tree: Any) -> dict[Any, Any]:
        return {path: leaf for path, leaf in flatten_dict(tree).items() if not others or path[1:3] != _OUTPUT}

    found = kept(variables)
    if listed := misfits(found, kept(abstract_variables(model, data.example_shape, data.example_dtype))):
        raise UsageError(f"init_from {init_from} does not fit this model: {listed}")
    if others and is_primary():
        counts = f"{len(config['class_names'])} classes, not the {data.num_classes} of this data"
        say(f"init_from {init_from} has {counts}: the output layer is initialised anew, and everything else is kept")
    tree: dict[str, Any] = unflatten_dict(found)
    return tree


def without_backbone(variables: dict[str, Any]) -> dict[str, Any]:
    """The head's part of `variables`."""
    parts = {name: {key: tree[key] for key in tree if key != "backbone"} for name, tree in variables.items()}
    return {name: tree for name, tree in parts.items() if tree}


def extract_features(
    recipe: Recipe, model: Classifier, variables: dict[str, Any], data: Dataset[Split], workers: int = 0
) -> Dataset[ArraySplit]:
    """The backbone's features of all of `data`, float32, with its running statistics.

    Args:
      recipe: gives sizes, augmentation and how many augmented passes (`feature_views`) the training split gets; their
        rows follow one another, whole pass by whole pass. 0: one pass without augmentation.
      model: has the backbone.
      variables: its parameters and running statistics.
      data: images.
      workers: processes that decode them; 0 for threads of this one.
    """
    # Never refused: the run may have begun on other devices. Any number divides over itself.
    mesh = fit_mesh(*dataclasses.astuple(recipe.mesh), rows=jax.device_count(), resuming=True)
    on_mesh = put(variables, shardings(mesh, variables))

    def features(augment: Any, variables: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        images = images if augment is None else augment(key, images)
        return model.apply(variables, images, False, method="features").astype(jnp.float32)  # type: ignore[union-attr]

    jit = partial(jit_with, convolution_options(mesh.devices.flat[0].platform))
    plain, augmented = jit(partial(features, None)), jit(partial(features, augmentation(recipe)))

    def run(split: Split, description: str, view: int | None = None) -> np.ndarray:
        """Features [N, D] of `split`; augmented with the random numbers of pass `view`."""
        # Random numbers are drawn by the batch, so views have batches of one size on all devices.
        size = divisible_size(mesh, recipe.eval_batch_size) if view is None else recipe.eval_batch_size
        side = recipe.data.side if view is None else recipe.data.train_side
        compiled = plain if view is None else augmented
        key = jax.random.fold_in(keys.init_key(recipe.data.split_seed), view or 0)
        order, parts = np.arange(len(split)), []
        local = process_local_batches(mesh, split, order, side, size, workers=workers, pad=True)
        with contextlib.closing(local), progress_bar(len(split), description, "image", is_primary()) as bar:
            for index, ((images, _), count) in enumerate(local):
                sharded = shard_process_local(mesh, images, size)
                parts.append(whole(compiled(on_mesh, sharded, jax.random.fold_in(key, index)))[:count])
                bar.update(count)
        return np.concatenate(parts)

    views = []
    for view in range(recipe.feature_views):
        split = data.train.random_crop(recipe.data.split_seed, view) if recipe.data.crops else data.train
        views.append(run(split, f"features, view {view + 1}", view))
    train = np.concatenate(views or [run(data.train, "features of train")])
    splits = {"train": ArraySplit(train, np.tile(data.train.labels, max(1, recipe.feature_views)))}
    for name, split in data.splits.items():
        if name != "train":
            splits[name] = ArraySplit(run(split, f"features of {name}"), split.labels)
    return array_dataset(splits, data.class_names, f"features of {data.source}")


def save_features(path: Path, data: Dataset[ArraySplit]) -> None:
    """Write `data` as an .npz that `--data.path` takes, whole or not at all."""
    arrays = {"class_names": np.array(data.class_names)}
    for name, split in data.splits.items():
        arrays |= {f"{name}_images": split.inputs, f"{name}_labels": split.labels}
    with whole_file(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def cached_features(
    recipe: Recipe,
    model: Classifier,
    start: dict[str, Any],
    data: Dataset[Split],
    directory: RunDirectory,
    workers: int,
) -> Dataset[ArraySplit]:
    """The features of `data` in the run's directory, computed unless it holds them.

    Args:
      recipe: has a frozen backbone.
      model: the recipe's.
      start: the variables that the run starts from, see `start_variables`.
      data: images.
      directory: the run's.
      workers: processes that decode them; 0 for threads of this one.
    """
    features, backbone = directory.path / FEATURES, directory.path / BACKBONE
    if not broadcast_from_primary(lambda: features.exists() and backbone.exists()):
        variables = complete_backbone(recipe, model, start, data)
        found = extract_features(recipe, model, variables, data, workers)
        if is_primary():
            save_variables(backbone, {name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree})
            save_features(features, found)
            directory.record(BACKBONE, FEATURES)
        barrier()
    directory.verify(BACKBONE, FEATURES)
    held = read_npz(features, data.num_classes)
    if data.train.groups is None:
        return held
    groups = np.tile(data.train.groups, max(1, recipe.feature_views))
    return dataclasses.replace(held, splits={**held.splits, "train": dataclasses.replace(held.train, groups=groups)})


def complete_backbone(recipe: Recipe, model: Classifier, start: dict[str, Any], data: Dataset[Split]) -> dict[str, Any]:
    """Variables of the model's backbone: those of `start`, or else drawn by the recipe's seed."""
    if all("backbone" in start.get(name, {}) for name in ("params", "batch_stats")):
        return start
    inputs = jnp.zeros((2, *data.example_shape), data.example_dtype)
    drawn = jax.jit(lambda seed: model.init(keys.init_key(seed), inputs, train=False))(recipe.seed)
    return {name: {**tree, **start.get(name, {})} for name, tree in drawn.items()}


def save_start(directory: RunDirectory, variables: dict[str, Any]) -> None:
    """Keep the variables that the run in `directory` starts from, if there are any."""
    if variables and is_primary():
        with writing(directory.path / START):
            save_variables(directory.path / START, variables)
        directory.record(START)
    barrier()


def load_start(directory: RunDirectory) -> dict[str, Any]:
    """The variables that the run in `directory` starts from, {} where it keeps none."""
    if not broadcast_from_primary((directory.path / START).exists):
        return {}
    directory.verify(START)
    return read_variables(directory.path / START)


def look_for_copies(
    directory: RunDirectory, data: Dataset[Split], rows: tuple[np.ndarray, np.ndarray], init_from: Path | None
) -> dict[str, int]:
    """Keep digests of the examples that a run sees, and warn of test examples among them.

    Args:
      directory: the run's.
      data: the run's.
      rows: indices of the examples to train on, and to validate on.
      init_from: the run that it starts from, or None.

    Returns:
      Counts for result.json.

    Raises:
      RunError: if they cannot be written.
    """
    contents = data.contents()
    test = len(contents.labels) - len(data.test) + np.arange(len(data.test))
    counts, text = contents.find_copies(*rows, test)
    seen = read_seen(directory)
    if seen is None:
        before = None if init_from is None else read_seen(RunDirectory(init_from))
        digests = [contents.digests[each] for each in rows]
        digests.append(np.zeros(0, np.uint64) if before is None else np.concatenate(list(before.values())))
        seen = {kind: np.unique(each) for kind, each in zip(KINDS, digests, strict=True)}
        with writing(directory.path / SEEN):
            save_variables(directory.path / SEEN, seen)
        directory.record(SEEN)
    if text:
        warn(f"{data.source}: {text}")
    if init_from is not None:
        known = test[np.isin(contents.digests[test], seen["before"])]
        counts["test_in_init_from"] = len(known)
        if len(known):
            count = f"{len(known):,} of {len(test):,} test examples are ones that {init_from} was trained on"
            warn(f"{data.source}: {count}: {contents.named(known)}")
        elif not len(seen["before"]):
            warn(f"{init_from} is a run without checksums: it may have been trained on the test examples")
    return counts


def read_seen(directory: RunDirectory) -> dict[str, np.ndarray] | None:
    """Digests by kind; None for a run of an earlier version, and, with a warning, for a damaged file."""
    try:
        if SEEN not in directory.recorded():
            return None
        directory.verify(SEEN)
        found: dict[str, Any] = read_variables(directory.path / SEEN)
    except PSpinalError as error:
        warn(str(error))
        return None
    return {kind: np.ravel(found[kind]) for kind in KINDS if kind in found}
