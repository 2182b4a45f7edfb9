"""The best model of a comparison as a run directory, which predict, evaluate, report and export open.

It takes the inputs as the comparison got them: how they were scaled is folded into the kernels that see them, and the
temperature into the output layer, so that its probabilities are those that the table is about.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from pspinal_jax.checkpoints import CheckpointStore
from pspinal_jax.comparison.report import LINEAR, describe_setting
from pspinal_jax.comparison.search import Comparer
from pspinal_jax.comparison.settings import HEADS
from pspinal_jax.data.dataset import ArraySplit, Dataset
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import PSpinalError
from pspinal_jax.models import with_default_preprocessing
from pspinal_jax.recipes.schema import Card, DataConfig, OptimizerConfig, Recipe, RunOptions
from pspinal_jax.runs.directory import RunDirectory, writing
from pspinal_jax.runs.result import BACKBONE, selected_checksum
from pspinal_jax.runs.scores import summary
from pspinal_jax.runs.start import KINDS, SEEN
from pspinal_jax.runs.train import run_config
from pspinal_jax.training.stages import TrainingProgress
from pspinal_jax.weights.variables import save_variables


class Source(NamedTuple):
    """The features to compare on, and where they come from.

    Attributes:
      data: the features, or small images.
      recipe: how a run reads them and, of a folder of images, with which frozen backbone.
      read: what it reads, the same or the images.
      backbone: gives variables, that backbone's among them; None where there is none.
      estimators: scikit-learn's classifiers to compare with, by name.
    """

    data: Dataset[ArraySplit]
    recipe: Recipe
    read: Dataset[Any]
    backbone: Callable[[], dict[str, Any]] | None = None
    estimators: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(
        cls, data: Dataset[Any], config: DataConfig, estimators: Mapping[str, Any] = MappingProxyType({})
    ) -> "Source":
        """Of what a run reads as `config` says."""
        recipe = Recipe(Card("compare", "none", "the best of a comparison"), config)
        return cls(data, recipe, data, None, estimators)


def best_held(result: dict[str, Any]) -> str | None:
    """The row that does best on validation of those that a run directory can hold: heads and linear baselines."""
    rows = {name: row["validation_accuracy"] for name, row in result["methods"].items() if name in (*HEADS, *LINEAR)}
    return max(rows, key=lambda name: rows[name]["mean"], default=None)


def save_best(comparer: Comparer, result: dict[str, Any], name: str, source: Source, path: Path) -> None:
    """Write the row `name` as a finished run to `path`, unless it is there; another one of this comparison is replaced.

    It is the first training on the data's own split, on training and validation examples but for ``--no-refit``.

    Raises:
      RunError: if it cannot be written.
    """
    row, (record, *_) = result["methods"][name], comparer.final_records(name)[0]
    recipe, refitted = _recipe(comparer, name, record["setting"], source.recipe), comparer.final == "refit"
    compared = {"row": name, "setting": record["setting"], "refit": refitted}
    config = run_config(recipe, RunOptions(), source.read) | {"compared": compared}
    directory = RunDirectory(path)
    with contextlib.suppress(PSpinalError):
        held = directory.config()
        if directory.result() and all(held.get(key) == config[key] for key in ("identity", "compared")):
            return
    with writing(path):
        if path.exists():
            shutil.rmtree(path)
    params, shift, scale = comparer.fit_final(name)
    if source.read.example_dtype == np.uint8 and source.backbone is None:  # a run divides pixels by 255
        shift, scale = shift / 255, scale * 255
    head = folded(recipe.model.head, params, shift, scale, record.get("temperature", 1.0))
    best: dict[str, Any] = {"params": {"head": head}, "batch_stats": {}}
    accuracy, epochs = record["validation_accuracy"], recipe.epochs
    progress = TrainingProgress(epoch=epochs, best_epoch=[epochs], best_accuracy=[accuracy])
    pool, (train, validation), empty = comparer.splits[0].pool, comparer.rows[0, 0], np.zeros(0, int)
    seen, digests = (pool, empty, empty) if refitted else (train, validation, empty), source.read.contents().digests
    with directory.held(config):
        with CheckpointStore(directory.checkpoints_path) as store:
            store.save(1, {"best": best}, dataclasses.asdict(progress))
        with writing(path):
            save_variables(
                path / SEEN, {kind: np.unique(digests[rows]) for kind, rows in zip(KINDS, seen, strict=True)}
            )
            directory.record(SEEN)
            if source.backbone is not None:
                trees = source.backbone().items()
                save_variables(path / BACKBONE, {kind: tree["backbone"] for kind, tree in trees if "backbone" in tree})
                directory.record(BACKBONE)
        directory.write_result(
            {
                "selection": f"best on validation of a comparison: {name}, {describe_setting(row['chosen'][:1])}",
                "head": recipe.model.head,
                "test_accuracy": summary([record["test_accuracy"]]),
                "validation_accuracy": summary([accuracy]),
                "selected_checksum": selected_checksum(best),
                "published_accuracy_percent": None,
                "parameters": row["parameters"],
                "train_examples": row["train_examples"],
                "epochs": epochs,
                "seconds": record["seconds"],
                "compile_seconds": 0.0,
                "device": device(),
                "versions": versions(),
            }
        )


def _recipe(comparer: Comparer, name: str, setting: dict[str, Any], recipe: Recipe) -> Recipe:
    """`recipe` with the head of the row `name` and, of one of our heads, with its training."""
    config, head = comparer.config, comparer.heads.get(name)
    model = dataclasses.replace(recipe.model, head="dense", dropout_rate=0.0, norm="none")
    training: dict[str, Any] = {}
    if head is not None:
        width = head.layer_width if name == "spinal" else config.layer_width
        sizes: dict[str, Any] = {"head": name, "layer_width": width, "num_layers": config.num_layers}
        model = dataclasses.replace(model, dropout_rate=setting["dropout_rate"], **sizes)
        rates = {field: setting[field] for field in ("learning_rate", "weight_decay")}
        training = {field: getattr(comparer.schedule, field) for field in ("epochs", "batch_size")}
        training["optimizer"] = OptimizerConfig(name="adamw", schedule="one_cycle", **rates)
        training["label_smoothing"] = setting["label_smoothing"]
    return with_default_preprocessing(dataclasses.replace(recipe, model=model, **training))


def folded(head: str, params: dict[str, Any], shift: np.ndarray, scale: np.ndarray, temperature: float) -> Any:
    """Parameters that do to x what `params` do to (x - `shift`) `scale`, with logits divided by `temperature`.

    Args:
      head: 'progressive', 'spinal', 'mlp' or 'dense'.
      params: its documented tree, of features [D].
      shift: [D].
      scale: [D].
      temperature: above 0.
    """
    half, found = len(shift) // 2, {}
    for layer, entry in params.items():
        kernel, bias = (np.array(entry[name], np.float64) for name in ("kernel", "bias"))
        seen = slice(None)
        if head == "spinal":  # one half, then the other
            seen = slice(half) if layer[-1] in "13579" else slice(half, None)
        if head in ("progressive", "dense") or layer == "layer_1" or (head == "spinal" and layer != "output"):
            rows = kernel[: len(shift[seen])]
            bias -= (shift * scale)[seen] @ rows
            rows *= scale[seen][:, None]
        last = temperature if layer == "output" else 1.0
        found[layer] = {
            "kernel": jax.device_put((kernel / last).astype(np.float32)),
            "bias": jax.device_put((bias / last).astype(np.float32)),
        }
    return found
