"""From a recipe and its model to the programs that a run calls, whatever its data."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from pspinal_jax.errors import UsageError
from pspinal_jax.heads.layouts import Layout, training_layout
from pspinal_jax.models.classifier import Classifier
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.training.optimizers import Schedule, make_optimizer
from pspinal_jax.training.programs import Programs, StepConfig, build_programs
from pspinal_jax.training.sharding import make_mesh, num_batch_shards, shards_parameters


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
    from pspinal_jax.augment import augment, rotate_crop_flip

    if recipe.data.augment == "rotation_crop_flip":
        return partial(rotate_crop_flip, size=recipe.data.image_size)
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
