"""What a training says of itself before it starts: its data by class, its model, its devices, its steps."""

from pathlib import Path

import numpy as np

from pspinal_jax.data.dataset import Dataset, Split
from pspinal_jax.environment import device
from pspinal_jax.errors import printable
from pspinal_jax.models import Classifier, abstract_variables, count_parameters
from pspinal_jax.recipes.registry import describe_head_training
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.build import split_examples
from pspinal_jax.training.stages import TrainingStage
from pspinal_jax.training.state import trainable

MOST_LISTED_CLASSES = 12
_NAMED = 3


def describe_opening(
    recipe: Recipe, init_from: Path | None, data: Dataset[Split], model: Classifier, stages: list[TrainingStage]
) -> list[str]:
    """The lines of a run's opening.

    Args:
      recipe: the recipe.
      init_from: the run whose parameters it starts from, or None.
      data: with its validation split, where one was drawn by class.
      model: the recipe's, backbone included.
      stages: what the run does.
    """
    name = "" if recipe.card.name == "none" else f"{recipe.card.name}: "
    counts = class_counts(recipe, data)
    sizes = ", ".join(f"{split} {of_class.sum():,}" for split, of_class in counts.items())
    lines = [f"{name}{data.source}, {data.num_classes} classes; examples: {sizes}"]
    lines += _classes(data.class_names, counts)
    lines.append(f"input {' x '.join(map(str, data.example_shape))} {data.example_dtype}; {_model(recipe, init_from)}")
    lines.append(_parameters(recipe, data, model))
    count, stage = device()["count"], stages[0]
    of = f" of {recipe.num_seeds} seeds" if recipe.num_seeds > 1 else ""
    lines.append(
        f"{device()['platform']} ({device()['kind']}){f', {count} devices' if count > 1 else ''}; {recipe.epochs} "
        f"epochs of {stage.steps_per_epoch:,} steps of {recipe.batch_size} examples{of}"
        + (f"; {' then '.join(stage.name for stage in stages)}" if len(stages) > 1 else "")
    )
    if recipe.cache_features:
        lines.append(describe_head_training(recipe))
    return lines


def class_counts(recipe: Recipe, data: Dataset[Split]) -> dict[str, np.ndarray]:
    """Examples of each class [C] in train, validation (where examples are held out) and test."""
    train, validation = split_examples(recipe, data)
    labels = data.train.labels
    if data.validation is not None:
        labels = np.concatenate([labels, data.validation.labels])
    splits = {"train": labels[train], "validation": labels[validation], "test": data.test.labels}
    return {
        name: np.bincount(of_split, minlength=data.num_classes) for name, of_split in splits.items() if len(of_split)
    }


def _classes(names: tuple[str, ...], counts: dict[str, np.ndarray]) -> list[str]:
    """A line a class where they are few, else the smallest ones and the largest."""
    train = counts["train"]
    if len(names) <= MOST_LISTED_CLASSES:
        shown = [printable(name) for name in names]
        width = max(len("class"), *map(len, shown))
        rows = [["class".ljust(width), *(split.rjust(10) for split in counts)]]
        rows += [
            [name.ljust(width), *(f"{of_class[index]:,}".rjust(10) for of_class in counts.values())]
            for index, name in enumerate(shown)
        ]
        return ["  " + "  ".join(row) for row in rows]
    order = np.argsort(train, kind="stable")
    smallest = ", ".join(f"{names[index]} {train[index]:,}" for index in order[:_NAMED])
    largest = order[-1]
    return [
        f"  in train {smallest} .. {names[largest]} {train[largest]:,} examples a class, median {np.median(train):,.0f}"
    ]


def _model(recipe: Recipe, init_from: Path | None) -> str:
    model = recipe.model
    layers = "" if model.head == "dense" else f" ({model.num_layers} layers of {model.layer_width})"
    head = f"{model.head} head{'' if model.head == 'mlp' else layers}"
    if model.backbone == "none":
        return head if init_from is None else f"{head}, from {init_from}"
    weights = f"from {init_from}" if init_from is not None else f"weights {model.weights or 'random'}"
    return f"backbone {model.backbone}, {weights}; {head}"


def _parameters(recipe: Recipe, data: Dataset[Split], model: Classifier) -> str:
    params = abstract_variables(model, data.example_shape, data.example_dtype)["params"]
    total = count_parameters(params)
    moving = count_parameters(trainable(params, ("backbone",) if recipe.freeze == "backbone" else ()))
    if moving == total:
        return f"{total:,} parameters, all of them trained"
    return f"{total:,} parameters, {moving:,} of them trained: the backbone is frozen"


def warn_of_random_backbone(recipe: Recipe, init_from: Path | None) -> str | None:
    """What to warn of where a frozen backbone was never trained, else None."""
    if recipe.freeze != "backbone" or recipe.model.weights is not None or init_from is not None:
        return None
    return (
        "the backbone is frozen with random weights: its features were never trained; give --model.weights or "
        "--init-from, or leave --freeze out"
    )
