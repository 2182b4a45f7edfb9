"""From a recipe, its model and its data to everything that the loop works with."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pspinal_jax.data.dataset import Dataset, Split, hold_out
from pspinal_jax.data.images.images import ImageDataset, ImageSplit
from pspinal_jax.distributed.coordination import is_primary
from pspinal_jax.errors import UsageError
from pspinal_jax.heads.layouts import Layout, training_layout
from pspinal_jax.models.classifier import Classifier
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.input_pipeline import (
    EvaluatedSplit,
    Examples,
    ResidentExamples,
    ResidentSplit,
    StreamedExamples,
    StreamedSplit,
)
from pspinal_jax.runs.progress import TrainingStage, make_stages
from pspinal_jax.training.optimizers import Schedule, make_optimizer
from pspinal_jax.training.programs import Programs, StepConfig, build_programs
from pspinal_jax.training.sharding import AXES, fit_mesh, num_batch_shards, shardings, shards_parameters


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run works with.

    Attributes:
      recipe: the recipe.
      model: the linen module.
      programs: the compiled pieces.
      examples: all training examples, validation included; stages pick theirs by index.
      splits: 'test', and 'validation' where examples were held out.
      stages: what the run does one after the other.
    """

    recipe: Recipe
    model: Classifier
    programs: Programs
    examples: Examples
    splits: Mapping[str, EvaluatedSplit]
    stages: list[TrainingStage]


def split_examples(recipe: Recipe, data: Dataset | ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation) into the training data; validation is empty where nothing is held out.

    A validation split of the data's own counts on from the end of its training split.

    Raises:
      UsageError: if a batch, the validation part or the mesh's axis model does not fit the data.
    """
    check_classes(recipe, data.num_classes)
    wants_validation = recipe.protocol == "validation"
    if isinstance(data, ImageDataset) or data.validation is not None:
        own = len(data.validation) if data.validation is not None and wants_validation else 0
        train, validation = np.arange(len(data.train)), len(data.train) + np.arange(own)
    else:
        held_out = recipe.data.num_validation if wants_validation else 0
        train, validation = hold_out(len(data.train), held_out, recipe.data.split_seed)
    if recipe.batch_size > len(train):
        raise UsageError(
            f"batch_size is {recipe.batch_size}, but only {len(train)} examples are left to train on; "
            "choose a smaller --batch-size"
        )
    return train, validation


def set_up(
    recipe: Recipe, model: Classifier, data: Dataset | ImageDataset, workers: int = 0, mesh: Mesh | None = None
) -> Setup:
    """Build the programs of `model` and split the data; raises as `split_examples`.

    Args:
      recipe: the recipe.
      model: the recipe's.
      data: arrays, which are brought to the devices, or photographs, which are read while training.
      workers: processes that decode photographs; 0 for threads of this one.
      mesh: the devices; by default as `run_mesh` says.
    """
    train, validation = split_examples(recipe, data)
    programs = build_run_programs(recipe, model, *input_of(recipe, data), mesh)
    # A validation split of the data's own follows the training examples; stages tell them apart by index.
    pool = data.train if data.validation is None else data.train.join(data.validation)  # type: ignore[arg-type]
    splits: dict[str, EvaluatedSplit] = {"test": place_split(recipe, programs, data.test, workers)}
    if len(validation):
        splits["validation"] = place_split(recipe, programs, pool.take(validation), workers)
    examples: Examples
    if isinstance(pool, ImageSplit):
        examples = StreamedExamples(programs, pool, recipe.data.train_side, recipe.batch_size, workers)
    else:
        examples = ResidentExamples(programs, pool)
    return Setup(
        recipe=recipe,
        model=model,
        programs=programs,
        examples=examples,
        splits=splits,
        stages=make_stages(recipe, train, validation),
    )


def input_of(recipe: Recipe, data: Dataset | ImageDataset) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of one example as the model of `recipe` sees it."""
    if isinstance(data, Dataset):
        return data.train.inputs.shape[1:], data.train.inputs.dtype
    side = recipe.data.image_size or 0
    return (side, side, 3), np.dtype(np.uint8)


def build_run_programs(
    recipe: Recipe, model: Classifier, input_shape: tuple[int, ...], input_dtype: Any, mesh: Mesh | None = None
) -> Programs:
    """The compiled pieces of the recipe's `model`, for inputs of one example's `input_shape` and dtype."""
    mesh = mesh or run_mesh(recipe)
    optimizer = recipe.optimizer
    config = StepConfig(
        input_shape=input_shape,
        input_dtype=input_dtype,
        batch_size=recipe.batch_size,
        eval_batch_size=recipe.eval_batch_size,
        label_smoothing=recipe.label_smoothing,
        vectorized=runs_vectorized(recipe),
        augment=augmentation(recipe),
        head_layout="tree" if shards_parameters(mesh) else _head_layout(recipe, num_batch_shards(mesh)),
        frozen=("backbone",) if recipe.freeze == "backbone" else (),
        micro_batches=recipe.micro_batches,
        skip_nonfinite=recipe.on_nonfinite == "skip",
        mesh=mesh,
        batch_norm_per_device=recipe.batch_norm == "per_device",
    )
    direction = make_optimizer(optimizer.name, optimizer.momentum, optimizer.nesterov, optimizer.weight_decay)
    return build_programs(model, direction, config)


def schedule_of(recipe: Recipe) -> Schedule:
    """The learning-rate schedule of `recipe`."""
    config = recipe.optimizer
    return Schedule(config.schedule, config.learning_rate, config.decay_epochs, config.warmup_fraction)


def _head_layout(recipe: Recipe, shards: int) -> Layout:
    model = recipe.model
    if model.head != "progressive":
        return "tree"
    return training_layout(
        model.implementation, model.num_layers, recipe.batch_size // shards, model.layer_dropout_rate > 0.0
    )


def augmentation(recipe: Recipe) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """The augmentation (key, images) -> images that `recipe` asks for, None for none."""
    if recipe.data.augment == "none":
        return None
    from pspinal_jax.augment import augment, rotate_crop_flip

    if recipe.data.augment == "rotation_crop_flip":
        return partial(rotate_crop_flip, size=recipe.data.image_size)
    return augment


def run_mesh(recipe: Recipe, *, resuming: bool = False) -> Mesh:
    """The devices that a run of `recipe` trains on; a line on standard error where they are not what was asked for.

    Args:
      recipe: gives the mesh, and the batches that shall divide over it.
      resuming: for a run that has begun, perhaps elsewhere: it goes on with any number of devices.

    Raises:
      UsageError: if the mesh does not fit the devices, or batch norm has too few examples on each of them.
    """
    per_device, rows = recipe.batch_norm == "per_device", recipe.batch_size // recipe.micro_batches
    asked, devices = dataclasses.astuple(recipe.mesh), jax.device_count()
    mesh = fit_mesh(*asked, rows=rows, least=2 if per_device else 1, resuming=resuming)
    shards = num_batch_shards(mesh)
    if per_device and rows < 2 * shards:
        raise UsageError(
            f"batch_size is {recipe.batch_size}, expected at least {2 * shards * recipe.micro_batches}: with "
            "--batch-norm per_device batch norm needs 2 examples on each device"
        )
    parts = " in its micro-batches" if recipe.micro_batches > 1 else ""
    problem = f"batch_size {recipe.batch_size}{parts} does not divide over {devices} devices"
    if per_device and rows % shards:
        raise UsageError(f"{problem}, which --batch-norm per_device asks for; change --batch-size or --mesh.data")
    line = ""
    if rows % shards:
        line = f"{problem}: each of them computes every batch whole"
    elif asked[0] == -1 and mesh.size < devices:
        line = f"{problem}: training uses {mesh.size} of them"
    if any(length not in (-1, mesh.shape[axis]) for axis, length in zip(AXES, asked, strict=True)):
        line = f"the run goes on over {' x '.join(f'{axis} {mesh.shape[axis]}' for axis in AXES)} of {devices} devices"
    if line and is_primary():
        print(line, file=sys.stderr)
    return mesh


def check_classes(recipe: Recipe, num_classes: int) -> None:
    """Raise UsageError unless the classes can be sharded evenly over the mesh's axis model."""
    shards = recipe.mesh.model
    if num_classes % shards:
        raise UsageError(f"mesh.model is {shards}, expected a divisor of {num_classes}, the number of classes")


def runs_vectorized(recipe: Recipe) -> bool:
    """Whether the seeds of `recipe` run as one program: on CPU that is no faster, elsewhere small models gain."""
    if recipe.num_seeds == 1 or recipe.seed_mode == "loop" or recipe.data.image_size is not None:
        return False
    return recipe.seed_mode == "vmap" or jax.default_backend() != "cpu"


def place_split(recipe: Recipe, programs: Programs, split: Split | ImageSplit, workers: int = 0) -> EvaluatedSplit:
    """`split`, ready to be evaluated in the recipe's evaluation batches."""
    if isinstance(split, ImageSplit):
        return StreamedSplit(programs, split, recipe.data.image_size or 0, programs.eval_batch_size, workers)
    return ResidentSplit.place(programs, split, programs.eval_batch_size)


def abstract_trees(trees: Any, recipe: Recipe, programs: Programs) -> Any:
    """Shapes and dtypes of a checkpoint's `trees`, with their shardings on this run's mesh, for restoring them.

    With them it does not matter on which mesh they were saved: each device reads its part of whatever was written.
    """
    places = shardings(programs.mesh, trees, stacked=recipe.num_seeds > 1)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), trees, places)


def longest_epoch(stages: list[TrainingStage]) -> int:
    """Steps of the longest epoch of all stages."""
    return max(stage.steps_per_epoch for stage in stages)


def padded_rates(rates: np.ndarray, length: int) -> np.ndarray:
    """`rates` followed by zeros up to `length`, so that every stage calls the same program."""
    return np.pad(rates, (0, length - len(rates)))
