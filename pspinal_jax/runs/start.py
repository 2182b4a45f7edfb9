"""What a run starts from: variables, and digests of the examples that it and the runs before it have seen.

start.safetensors   the variables, where they are not the seed's alone
seen.safetensors    train, validation: digests of the run's own examples, uint64 [N], see `pspinal_jax.data.dataset`;
                    before: of those that the run given by --init-from has seen, and the ones before it
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pspinal_jax.data.dataset import Dataset, Split
from pspinal_jax.distributed import barrier, broadcast_from_primary, is_primary
from pspinal_jax.errors import PSpinalError, UsageError
from pspinal_jax.models import Classifier, abstract_variables
from pspinal_jax.progress import say, warn
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.directory import RunDirectory, writing
from pspinal_jax.runs.result import load_variables, misfits
from pspinal_jax.weights import backbone_variables
from pspinal_jax.weights.variables import read_variables, save_variables

START = "start.safetensors"
SEEN = "seen.safetensors"
KINDS = ("train", "validation", "before")
_OUTPUT = ("head", "output")


def start_variables(
    recipe: Recipe,
    model: Classifier,
    init_from: Path | None,
    input_shape: tuple[int, ...],
    input_dtype: Any,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Variables to start from, by collection; what is not in them starts from the seed.

    Args:
      recipe: may name weights for the backbone.
      model: the recipe's.
      init_from: run directory whose selected parameters and running statistics are taken, those of the output layer
        only where the classes are the same; they go before the weights.
      input_shape: one example's shape.
      input_dtype: its dtype.
      class_names: names of the classes.

    Raises:
      PSpinalError: if something cannot be read, or does not fit the model.
    """
    if init_from is None:
        weights = recipe.model.weights
        backbone = {} if weights is None else backbone_variables(recipe.model.backbone, weights)
        return {collection: {"backbone": tree} for collection, tree in backbone.items()}
    variables, config = load_variables(init_from)
    others = config["class_names"] != list(class_names)

    def kept(tree: Any) -> dict[Any, Any]:
        return {path: leaf for path, leaf in flatten_dict(tree).items() if not others or path[1:3] != _OUTPUT}

    found = kept(variables)
    if listed := misfits(found, kept(abstract_variables(model, input_shape, input_dtype))):
        raise UsageError(f"init_from {init_from} does not fit this model: {listed}")
    if others and is_primary():
        counts = f"{len(config['class_names'])} classes, not the {len(class_names)} of this data"
        say(f"init_from {init_from} knows {counts}: the output layer starts anew, all else is kept")
    tree: dict[str, Any] = unflatten_dict(found)
    return tree


def save_start(directory: RunDirectory, variables: dict[str, Any]) -> None:
    """Keep the variables that the run in `directory` starts from, if there are any."""
    if variables and is_primary():
        with writing(directory.path / START):
            save_variables(directory.path / START, variables)
        directory.record(START)
    barrier()


def load_start(directory: RunDirectory, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The variables that the run in `directory` starts from; `read` gives those of a run that keeps none."""
    if broadcast_from_primary((directory.path / START).exists):
        directory.verify(START)
        return read_variables(directory.path / START)
    variables = read()
    save_start(directory, variables)
    return variables


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
        places = test[np.isin(contents.digests[test], seen["before"])]
        counts["test_in_init_from"] = len(places)
        if len(places):
            count = f"{len(places):,} of {len(test):,} test examples are ones that {init_from} was trained on"
            warn(f"{data.source}: {count}: {contents.named(places)}")
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
