"""From a recipe, its model and its data to everything that the loop works with."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pspinal_jax.augment.mixing import mix
from pspinal_jax.data.dataset import Dataset, Split, copies_of_a_class, hold_out
from pspinal_jax.distributed import is_primary
from pspinal_jax.environment import convolution_options
from pspinal_jax.errors import UsageError
from pspinal_jax.heads.layouts import Layout, training_layout
from pspinal_jax.models import Classifier, build_model
from pspinal_jax.progress import say
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.training.examples import EvaluatedSplit, Examples, InMemoryExamples
from pspinal_jax.training.images import streaming_examples, streaming_split
from pspinal_jax.training.loop import Setup
from pspinal_jax.training.optimizers import Schedule, learning_rates, make_optimizer
from pspinal_jax.training.programs import Programs
from pspinal_jax.training.sharding import AXES, fit_mesh, num_batch_shards, shards_parameters
from pspinal_jax.training.stages import LoopConfig, TrainingStage, make_stage
from pspinal_jax.training.state import head_layouts
from pspinal_jax.training.step import EvalStep, TrainStep, target_losses


@dataclasses.dataclass(frozen=True)
class RunSetup(Setup):
    """What a run of a recipe works with.

    Attributes:
      recipe: the recipe.
      model: the linen module.
    """

    recipe: Recipe
    model: Classifier


def loop_config(recipe: Recipe) -> LoopConfig:
    """What the loop has to know of `recipe`."""
    schedule = schedule_of(recipe)
    return LoopConfig(
        seed=recipe.seed,
        num_seeds=recipe.num_seeds,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rates=lambda epoch, steps: learning_rates(schedule, epoch, steps, recipe.epochs),
        shuffle=recipe.data.shuffle,
        selected_by=selected_by(recipe),
        patience=recipe.patience,
        keeps_first_of_ties=recipe.protocol == "paper",
        restarts_rate=recipe.optimizer.steering != "none",
        stop_on_nonfinite=recipe.on_nonfinite == "stop",
    )


def split_examples(recipe: Recipe, data: Dataset[Split]) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation) into the training data; validation is empty where nothing is held out.

    The examples of a validation split in the data are numbered after those of its training split.

    Raises:
      UsageError: if a batch, the validation part or the mesh's axis model does not fit the data.
    """
    check_classes(recipe, data.num_classes)
    wants_validation = recipe.protocol == "validation"
    if data.validation is not None or not data.in_memory:
        count = len(data.validation) if data.validation is not None and wants_validation else 0
        train, validation = np.arange(len(data.train)), len(data.train) + np.arange(count)
    else:
        held_out = recipe.data.num_validation if wants_validation else 0
        together = held_out and recipe.data.keep_copies_together
        copies = copies_of_a_class(data.train.digests, data.train.labels) if together else None
        train, validation = hold_out(len(data.train), held_out, recipe.data.split_seed, copies)
    if (recipe.patience or recipe.retrain) and not len(validation):
        given = f"patience is {recipe.patience}, expected 0" if recipe.patience else "retrain is True, expected False"
        field = "num_validation" if data.in_memory else "validation_fraction"
        raise UsageError(f"{given} where nothing is held out to validate on; hold some out with data.{field}")
    if recipe.batch_size > len(train):
        count = len(train)
        raise UsageError(
            f"batch_size is {recipe.batch_size}, expected at most {count}, the number of training examples"
        )
    for stage in make_stages(recipe, train, validation):
        if stage.tail_size == 1 and recipe.refuses_batches_of_one:
            raise UsageError(
                f"batch_size is {recipe.batch_size}, which leaves 1 example for the last batch of an epoch, and batch "
                "norm needs 2; choose another, or drop the last batch with data.drop_remainder"
            )
    return train, validation


def make_stages(recipe: Recipe, train: np.ndarray, validation: np.ndarray) -> list[TrainingStage]:
    """The stages of a run, from the indices of its training and validation examples."""
    everything = np.sort(np.concatenate([train, validation]))
    stages: list[tuple[str, np.ndarray, str | None]]
    if recipe.protocol == "paper":
        rounds = ["train"] if recipe.rounds == 1 else [f"round_{index + 1}" for index in range(recipe.rounds)]
        stages = [(name, everything, "test") for name in rounds]
    elif not len(validation):
        stages = [("train", everything, None)]
    else:
        stages = [("train", train, "validation")] + [("retrain", everything, None)] * recipe.retrain
    return [make_stage(*stage, recipe.batch_size, recipe.data.drop_remainder) for stage in stages]


def selected_by(recipe: Recipe) -> str:
    """What the epoch is selected by: balanced accuracy where training balances the classes."""
    balances = "balanced" in (recipe.class_weights, recipe.sampler)
    return "balanced_accuracy" if balances and recipe.protocol == "validation" else "accuracy"


def set_up(recipe: Recipe, data: Dataset[Split], workers: int = 0, mesh: Mesh | None = None) -> RunSetup:
    """Build the model and its compiled steps, and split the data; raises as `split_examples`.

    Args:
      recipe: the recipe.
      data: arrays, which are brought to the devices, or images, which are read while training.
      workers: processes that decode images; 0 for threads of this one.
      mesh: the devices; by default as `run_mesh` says.
    """
    train, validation = split_examples(recipe, data)
    model = build_model(recipe, data.example_shape, data.num_classes)
    # A validation split in the data follows the training examples; stages select by index.
    pool = data.train if data.validation is None else data.train.join(data.validation)
    weights = class_weights(recipe, pool.labels[train], data.num_classes)
    programs = build_run_programs(recipe, model, data.example_shape, data.example_dtype, mesh, weights)
    examples: Examples
    if pool.inputs is None:
        examples = streaming_examples(programs, pool, recipe.data.train_side, workers, recipe.data.crops)
    else:
        examples = InMemoryExamples(programs, (pool.inputs, pool.labels))

    def evaluated(split: Split) -> EvaluatedSplit:
        if split.inputs is None:
            return streaming_split(programs, split, recipe.data.side, workers)
        return EvaluatedSplit.in_memory(programs, (split.inputs, split.labels))

    splits = {"test": evaluated(data.test)}
    if len(validation):
        splits["validation"] = evaluated(pool.take(validation))
    return RunSetup(
        recipe=recipe,
        model=model,
        config=loop_config(recipe),
        programs=programs,
        examples=examples,
        splits=splits,
        stages=make_stages(recipe, train, validation),
        labels=pool.labels if recipe.sampler == "balanced" else None,
    )


def build_run_programs(
    recipe: Recipe,
    model: Classifier,
    input_shape: tuple[int, ...],
    input_dtype: Any,
    mesh: Mesh | None = None,
    weights: tuple[float, ...] | None = None,
) -> Programs:
    """The compiled pieces of the recipe's `model`, for inputs of one example's `input_shape` and dtype.

    `weights` are those of `class_weights`; only training needs them.
    """
    mesh = mesh or run_mesh(recipe)
    optimizer, config = recipe.optimizer, recipe.model
    mixup, cutmix = recipe.augment.mixup, recipe.augment.cutmix
    layout: Layout = "tree"
    if config.head == "progressive" and not shards_parameters(mesh):
        rows, dropout = recipe.batch_size // num_batch_shards(mesh), config.layer_dropout_rate > 0.0
        layout = training_layout(config.implementation, config.num_layers, rows, dropout)
    settings = (optimizer.name, optimizer.momentum, optimizer.nesterov, optimizer.weight_decay)
    direction = make_optimizer(*settings, recipe.gradient_clip, optimizer.backbone_rate)
    step = TrainStep(
        model.apply,
        direction,
        partial(target_losses, label_smoothing=recipe.label_smoothing, class_weights=weights),
        augment=augmentation(recipe),
        mix=partial(mix, mixup=mixup, cutmix=cutmix) if mixup or cutmix else None,
        ema_decay=recipe.ema_decay,
        frozen=("backbone",) if recipe.freeze == "backbone" else (),
        micro_batches=recipe.micro_batches,
        skip_nonfinite=recipe.on_nonfinite == "skip",
    )
    return Programs(
        model,
        step,
        EvalStep(model.apply),
        jax.ShapeDtypeStruct(input_shape, input_dtype),
        recipe.batch_size,
        recipe.eval_batch_size,
        vectorized=runs_vectorized(recipe),
        head_layouts={} if shards_parameters(mesh) else head_layouts(layout),
        mesh=mesh,
        compiler_options=convolution_options(mesh.devices.flat[0].platform) if config.backbone != "none" else {},
        batch_norm_per_device=recipe.batch_norm == "per_device",
    )


def schedule_of(recipe: Recipe) -> Schedule:
    """The learning-rate schedule of `recipe`."""
    config = recipe.optimizer
    return Schedule(
        config.schedule, config.learning_rate, config.decay_epochs, config.warmup_fraction, config.warmup_epochs
    )


def class_weights(recipe: Recipe, labels: np.ndarray, num_classes: int) -> tuple[float, ...] | None:
    """What `recipe` weights the loss of each class with, given the training `labels`; None for nothing."""
    return balanced_weights(labels, num_classes) if recipe.class_weights == "balanced" else None


def balanced_weights(labels: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """N / (K n_c) for every class c: N `labels`, n_c of them c, K classes that occur; their mean over `labels` is 1.

    A class that does not occur counts as if it did once. The same as scikit-learn's ``class_weight="balanced"``.
    """
    counts = np.bincount(labels, minlength=num_classes)
    return tuple((len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))).tolist())


def augmentation(recipe: Recipe) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """The augmentation (key, images) -> images that `recipe` asks for, None for none."""
    name, strength, side = recipe.data.augment, recipe.augment.color_jitter, recipe.data.side
    if name == "none" and not strength:
        return None
    from pspinal_jax.augment import ResizedCrop, augment, resized_crop_flip, rotate_crop_flip

    crops: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "rotation_crop_flip": partial(rotate_crop_flip, size=side),
        "resized_crop_flip": partial(resized_crop_flip, size=side, settings=ResizedCrop(recipe.augment.min_area)),
    }
    moved = None if name == "none" else crops.get(name, augment)
    return partial(_move_and_color, moved, strength) if strength else moved


def _move_and_color(moved: Any, strength: float, key: jax.Array, images: jax.Array) -> jax.Array:
    from pspinal_jax.augment import color_jitter

    images = images if moved is None else moved(key, images)
    return color_jitter(jax.random.fold_in(key, 1), images, strength)


def run_mesh(recipe: Recipe, *, resuming: bool = False) -> Mesh:
    """The devices that a run of `recipe` trains on; a line on standard error where they are not what was asked for.

    Args:
      recipe: gives the mesh, and the batches to divide over it.
      resuming: for a run that has begun, perhaps elsewhere: it goes on with any number of devices.

    Raises:
      UsageError: if the mesh does not fit the devices, or batch norm has too few examples on each of them.
    """
    per_device, rows = recipe.batch_norm == "per_device", recipe.batch_size // recipe.micro_batches
    asked, devices = dataclasses.astuple(recipe.mesh), jax.device_count()
    mesh = fit_mesh(*asked, rows=rows, least=2 if per_device else 1, resuming=resuming)
    shards = num_batch_shards(mesh)
    if per_device and (rows < 2 * shards or rows % shards):
        each = shards * recipe.micro_batches
        raise UsageError(
            f"batch_size is {recipe.batch_size}, expected at least {2 * each} and a multiple of {each}: with "
            "batch_norm=per_device batch norm needs 2 examples on each device"
        )
    parts = " in its micro-batches" if recipe.micro_batches > 1 else ""
    problem = f"batch_size {recipe.batch_size}{parts} does not divide over {devices} devices"
    if not is_primary():
        return mesh
    if any(length not in (-1, mesh.shape[axis]) for axis, length in zip(AXES, asked, strict=True)):
        say(f"the run uses a mesh of {' x '.join(f'{axis} {mesh.shape[axis]}' for axis in AXES)} of {devices} devices")
    elif rows % shards:
        say(f"{problem}: each of them computes every batch whole")
    elif asked[0] == -1 and mesh.size < devices:
        say(f"{problem}: training uses {mesh.size} of them")
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
    return recipe.seed_mode == "vmap" or (recipe.seed_mode == "auto" and jax.default_backend() != "cpu")
