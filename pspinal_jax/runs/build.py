"""From a recipe, its model and its data to everything that the loop works with."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from pspinal_jax.data.dataset import Dataset, Split, hold_out
from pspinal_jax.data.images.images import ImageDataset, ImageSplit
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
from pspinal_jax.training.sharding import make_mesh, num_batch_shards, shardings, shards_parameters


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
      UsageError: if a batch or the validation part does not fit the data or the devices.
    """
    check_devices(recipe)
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


def set_up(recipe: Recipe, model: Classifier, data: Dataset | ImageDataset, workers: int = 0) -> Setup:
    """Build the programs of `model` and split the data; raises as `split_examples`.

    Args:
      recipe: the recipe.
      model: the recipe's.
      data: arrays, which are brought to the devices, or photographs, which are read while training.
      workers: processes that decode photographs; 0 for threads of this one.
    """
    train, validation = split_examples(recipe, data)
    programs = build_run_programs(recipe, model, *input_of(recipe, data))
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


def build_run_programs(recipe: Recipe, model: Classifier, input_shape: tuple[int, ...], input_dtype: Any) -> Programs:
    """The compiled pieces of the recipe's `model`, for inputs of one example's `input_shape` and dtype."""
    mesh = make_mesh(*dataclasses.astuple(recipe.mesh))
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
    from pspinal_jax.augment import augment, augment_photographs

    if recipe.data.augment == "rotation_crop_flip":
        return partial(augment_photographs, size=recipe.data.image_size)
    return augment


def check_devices(recipe: Recipe) -> None:
    """Raise UsageError unless the mesh fits the devices, and batches can be spread evenly over it."""
    shards, parts = num_batch_shards(make_mesh(*dataclasses.astuple(recipe.mesh))), recipe.micro_batches
    least = 2 * shards * parts
    if recipe.batch_norm == "per_device" and recipe.batch_size < least:
        raise UsageError(
            f"batch_size is {recipe.batch_size}, expected at least {least}: with --batch-norm per_device batch norm "
            "needs 2 examples on each device"
        )
    for name, factor in (("batch_size", shards * parts), ("eval_batch_size", shards)):
        size = getattr(recipe, name)
        if size % factor:
            what = f"{shards} devices" + (f" times {parts} micro-batches" if factor > shards else "")
            raise UsageError(
                f"{name} is {size}, expected a multiple of {factor}: {what}; change --{name.replace('_', '-')}"
            )


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
        return StreamedSplit(programs, split, recipe.data.image_size or 0, recipe.eval_batch_size, workers)
    return ResidentSplit.place(programs, split, recipe.eval_batch_size)


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
