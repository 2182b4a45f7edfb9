"""From a recipe, its model and its data to everything that the loop works with."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from pspinal_jax.data.dataset import Dataset, Split, copies_of_a_class, hold_out
from pspinal_jax.errors import UsageError
from pspinal_jax.models import Classifier
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.programs import build_run_programs, check_classes, class_weights, schedule_of
from pspinal_jax.training.examples import (
    EvaluatedSplit,
    Examples,
    ResidentExamples,
    ResidentSplit,
    StreamedExamples,
    StreamedSplit,
)
from pspinal_jax.training.loop import Setup
from pspinal_jax.training.optimizers import learning_rates
from pspinal_jax.training.programs import Programs
from pspinal_jax.training.stages import LoopConfig, make_stages, selected_by


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
        balanced=recipe.sampler == "balanced",
        selected_by=selected_by(recipe),
        patience=recipe.patience,
        keeps_first_of_ties=recipe.protocol == "paper",
        restarts_rate=recipe.optimizer.steering != "none",
        stop_on_nonfinite=recipe.on_nonfinite == "stop",
        advice="lower --optimizer.learning-rate, or leave such steps out with --on-nonfinite skip (in another "
        "--workdir)",
    )


def split_examples(recipe: Recipe, data: Dataset[Split]) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation) into the training data; validation is empty where nothing is held out.

    A validation split of the data's own counts on from the end of its training split.

    Raises:
      UsageError: if a batch, the validation part or the mesh's axis model does not fit the data.
    """
    check_classes(recipe, data.num_classes)
    wants_validation = recipe.protocol == "validation"
    if data.validation is not None or not data.in_memory:
        own = len(data.validation) if data.validation is not None and wants_validation else 0
        train, validation = np.arange(len(data.train)), len(data.train) + np.arange(own)
    else:
        held_out = recipe.data.num_validation if wants_validation else 0
        together = held_out and recipe.data.keep_copies_together
        copies = copies_of_a_class(data.train.digests, data.train.labels) if together else None
        train, validation = hold_out(len(data.train), held_out, recipe.data.split_seed, copies)
    for name, off in (("patience", 0), ("retrain", False)):
        if getattr(recipe, name) and not len(validation):
            raise UsageError(
                f"{name} is {getattr(recipe, name)}, expected {off} where nothing is held out to look at; "
                f"hold some out with --data.{'num-validation' if data.in_memory else 'validation-fraction'}"
            )
    if recipe.batch_size > len(train):
        raise UsageError(
            f"batch_size is {recipe.batch_size}, but only {len(train)} examples are left to train on; "
            "choose a smaller --batch-size"
        )
    for stage in make_stages(recipe, train, validation):
        if stage.tail_size == 1 and recipe.refuses_batches_of_one:
            raise UsageError(
                f"batch_size is {recipe.batch_size}, which leaves 1 of {len(stage.subset)} examples as the last batch "
                "of an epoch, and batch norm learns from 2 or more; choose another --batch-size, or leave it out with "
                "--data.drop-remainder"
            )
    return train, validation


def set_up(
    recipe: Recipe, model: Classifier, data: Dataset[Split], workers: int = 0, mesh: Mesh | None = None
) -> RunSetup:
    """Build the programs of `model` and split the data; raises as `split_examples`.

    Args:
      recipe: the recipe.
      model: the recipe's.
      data: arrays, which are brought to the devices, or images, which are read while training.
      workers: processes that decode images; 0 for threads of this one.
      mesh: the devices; by default as `run_mesh` says.
    """
    train, validation = split_examples(recipe, data)
    # A validation split of the data's own follows the training examples; stages tell them apart by index.
    pool = data.train if data.validation is None else data.train.join(data.validation)
    weights = class_weights(recipe, pool.labels[train], data.num_classes)
    programs = build_run_programs(recipe, model, data.example_shape, data.example_dtype, mesh, weights)
    splits: dict[str, EvaluatedSplit] = {"test": place_split(recipe, programs, data.test, workers)}
    if len(validation):
        splits["validation"] = place_split(recipe, programs, pool.take(validation), workers)
    examples: Examples
    if pool.inputs is None:
        examples = StreamedExamples(
            programs, pool, recipe.data.train_side, recipe.batch_size, workers, moves=recipe.data.crops
        )
    else:
        examples = ResidentExamples(programs, (pool.inputs, pool.labels))
    return RunSetup(
        recipe=recipe,
        model=model,
        config=loop_config(recipe),
        programs=programs,
        examples=examples,
        splits=splits,
        stages=make_stages(recipe, train, validation),
        labels=pool.labels,
        validation_labels=pool.labels[validation],
    )


def place_split(recipe: Recipe, programs: Programs, split: Split, workers: int = 0) -> EvaluatedSplit:
    """`split`, ready to be evaluated in the recipe's evaluation batches."""
    if split.inputs is None:
        return StreamedSplit(programs, split, recipe.data.side, programs.eval_batch_size, workers)
    return ResidentSplit.place(programs, (split.inputs, split.labels), programs.eval_batch_size)
