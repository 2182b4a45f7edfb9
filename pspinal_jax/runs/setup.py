"""From a recipe and its data to everything that the loop works with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pspinal_jax.data.arrays import Dataset, Split
from pspinal_jax.data.splits import hold_out
from pspinal_jax.errors import UsageError
from pspinal_jax.heads.forms import Form, running_form
from pspinal_jax.models.build import build_model
from pspinal_jax.models.classifier import Classifier
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.stages import Stage, make_stages
from pspinal_jax.training.chunk import Batch
from pspinal_jax.training.optimizers import make_optimizer
from pspinal_jax.training.programs import Programs, build_programs, padded_split


@dataclasses.dataclass(frozen=True)
class EvaluatedSplit:
    """A split on the devices: padded arrays, and how many of their examples are real."""

    arrays: Batch
    count: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run works with.

    Attributes:
      recipe: the recipe.
      model: the linen module.
      programs: the compiled pieces.
      train: all training examples on the devices, validation included; stages pick theirs by index.
      splits: 'test', and 'validation' where examples were held out.
      stages: what the run does one after the other.
    """

    recipe: Recipe
    model: Classifier
    programs: Programs
    train: Batch
    splits: dict[str, EvaluatedSplit]
    stages: list[Stage]


def split_examples(recipe: Recipe, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation) into the training data; validation is empty where nothing is held out.

    Raises:
      UsageError: if a batch or the validation part does not fit the data or the devices.
    """
    check_devices(recipe)
    held_out = recipe.data.num_validation if recipe.protocol == "validation" else 0
    train, validation = hold_out(len(data.train), held_out, recipe.data.split_seed)
    if recipe.batch_size > len(train):
        raise UsageError(
            f"batch_size is {recipe.batch_size}, but only {len(train)} examples are left to train on; "
            "choose a smaller --batch-size"
        )
    return train, validation


def set_up(recipe: Recipe, data: Dataset) -> Setup:
    """Build the model and its programs, split the data and bring it to the devices; raises as `split_examples`."""
    train, validation = split_examples(recipe, data)
    input_shape = data.train.inputs.shape[1:]
    model, programs = build_run_programs(recipe, input_shape, data.train.inputs.dtype, data.num_classes)
    splits = {"test": place_split(programs, data.test, recipe.eval_batch_size)}
    if len(validation):
        splits["validation"] = place_split(programs, data.train.take(validation), recipe.eval_batch_size)
    return Setup(
        recipe=recipe,
        model=model,
        programs=programs,
        train=programs.replicate((data.train.inputs, data.train.labels)),
        splits=splits,
        stages=make_stages(recipe, train, validation),
    )


def build_run_programs(
    recipe: Recipe, input_shape: tuple[int, ...], input_dtype: Any, num_classes: int
) -> tuple[Classifier, Programs]:
    """The model of `recipe` and its compiled pieces, for inputs of one example's `input_shape` and dtype."""
    model = build_model(recipe, input_shape, num_classes)
    programs = build_programs(
        model,
        make_optimizer(recipe.optimizer),
        input_shape=input_shape,
        input_dtype=input_dtype,
        batch_size=recipe.batch_size,
        eval_batch_size=recipe.eval_batch_size,
        label_smoothing=recipe.label_smoothing,
        vectorized=runs_vectorized(recipe),
        augment=augmentation(recipe),
        head_form=_head_form(recipe),
    )
    return model, programs


def _head_form(recipe: Recipe) -> Form:
    model = recipe.model
    if model.head != "progressive":
        return "tree"
    rows = recipe.batch_size // jax.local_device_count()
    return running_form(model.implementation, model.num_layers, rows, model.layer_dropout_rate > 0.0)


def augmentation(recipe: Recipe) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """The augmentation (key, images) -> images that `recipe` asks for, None for none."""
    if recipe.data.augment == "none":
        return None
    from pspinal_jax.augment import augment

    return augment


def place_split(programs: Programs, split: Split, batch_size: int) -> EvaluatedSplit:
    """`split` on the devices, padded to whole batches."""
    return EvaluatedSplit(programs.replicate(padded_split(split, batch_size)), len(split))


def check_devices(recipe: Recipe) -> None:
    """Raise UsageError unless both batch sizes can be spread evenly over the devices."""
    devices = jax.local_device_count()
    for name in ("batch_size", "eval_batch_size"):
        size = getattr(recipe, name)
        if size % devices:
            raise UsageError(
                f"{name} is {size}, expected a multiple of the {devices} devices; change --{name.replace('_', '-')}"
            )


def runs_vectorized(recipe: Recipe) -> bool:
    """Whether the seeds of `recipe` run as one program: on CPU that is no faster, elsewhere small models gain."""
    if recipe.num_seeds == 1 or recipe.seed_mode == "loop":
        return False
    return recipe.seed_mode == "vmap" or jax.default_backend() != "cpu"


def abstract_trees(trees: Any, programs: Programs) -> Any:
    """Shapes, dtypes and shardings of `trees`, for restoring them."""
    replicated = programs.replicated
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), trees)


def total_steps(recipe: Recipe, stage: Stage) -> int:
    """Steps that the learning-rate schedule of `stage` spans."""
    return recipe.epochs * stage.steps_per_epoch


def longest_epoch(stages: list[Stage]) -> int:
    """Steps of the longest epoch of all stages."""
    return max(stage.steps_per_epoch for stage in stages)


def padded_rates(rates: np.ndarray, length: int) -> np.ndarray:
    """`rates` followed by zeros up to `length`, so that every stage calls the same program."""
    return np.pad(rates, (0, length - len(rates)))
