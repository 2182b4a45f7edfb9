"""The result of a finished run: result.json."""

from functools import partial
from typing import Any

import jax
import numpy as np

from pspinal_jax.checkpoints.checksum import json_checksum, tree_checksums
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import RunError, printable
from pspinal_jax.models import count_parameters
from pspinal_jax.runs.build import RunSetup
from pspinal_jax.runs.classification_report import averages, scores_by_class, without_examples
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.metrics import summary
from pspinal_jax.training.loop import Trainer
from pspinal_jax.training.stages import selected_by

_MOST_CLASSES = 6


def make_result(trainer: Trainer, setup: RunSetup, directory: RunDirectory) -> dict[str, Any]:
    """What result.json holds. Under the validation protocol this is where the test split is evaluated, once.

    Raises:
      Stopped: after SIGINT or SIGTERM; the run is saved.
    """
    progress, recipe = trainer.progress, setup.recipe
    params = trainer.seed_states.trees()["params"]
    result: dict[str, Any] = {
        "recipe": recipe.card.name,
        "row": recipe.card.row,
        "protocol": recipe.protocol,
        "selection": describe_selection(setup),
        "head": recipe.model.head,
        "seeds": trainer.seed_states.seeds,
    }
    paper = recipe.protocol == "paper"
    test = setup.splits["test"]
    sums = test.evaluate(partial(trainer.seed_states.evaluate, best=not paper), trainer.stop_if_asked)
    if paper:
        result["test_accuracy"] = summary(progress.last_accuracy)
        result["last_test_accuracy"] = summary(progress.last_accuracy)
        result["best_on_test_accuracy"] = summary(progress.best_accuracy)
        result["best_on_test_epoch"] = progress.best_epoch
    else:
        result["test_accuracy"] = summary((sums["correct"] / test.count).tolist())
        selected = progress.selected_epoch or progress.best_epoch
        validation = progress.selected_accuracy or progress.best_accuracy
        loss = [each for each in progress.selected_loss or progress.best_loss if each is not None]
        if validation:
            result[f"validation_{selected_by(recipe)}"] = summary(validation)
        if loss and len(loss) == len(validation):
            result["validation_loss"] = summary(loss)
        result["selected_epoch"] = selected
    lines = directory.metrics()
    trees = trainer.seed_states.trees()
    if recipe.patience:
        stopped = progress.lines - progress.epoch if progress.selected_epoch else progress.epoch
        result["early_stopping"] = {"patience": recipe.patience, "epochs": stopped}
    return result | {
        "test_loss": summary((sums["loss"] / test.count).tolist()),
        **_by_class(test.labels, sums["predictions"], directory.config()["class_names"]),
        "selected_checksum": selected_checksum(trees if paper else trees["best"]),
        "published_accuracy_percent": published_accuracy(setup),
        "parameters": count_parameters(params) // recipe.num_seeds,
        "train_examples": len(trainer.stage.subset),
        "test_examples": test.count,
        "epochs": recipe.epochs,
        "seconds": round(progress.total_seconds, 3),
        "compile_seconds": round(sum(line.get("compile_seconds", 0.0) for line in lines), 3),
        "seeds_as": _seeds_as(trainer),
        "device": device(),
        "versions": versions(),
    }


def _seeds_as(trainer: Trainer) -> str:
    if trainer.progress.processes > 1:
        return f"{trainer.progress.processes} processes side by side"
    return "one program" if trainer.setup.programs.vectorized else "one after the other"


def _by_class(labels: np.ndarray, predictions: np.ndarray, class_names: list[str]) -> dict[str, Any]:
    """Scores that a large class does not decide, of predictions [K, N] of the seeds, and recall by class."""
    seeds = [scores_by_class(labels, each, tuple(class_names)) for each in predictions]
    means = [averages(classes) for classes in seeds]
    return {
        "test_balanced_accuracy": summary([each["balanced_accuracy"] for each in means]),
        "test_macro_f1": summary([each["macro_f1"] for each in means]),
        "test_classes": [
            {
                "name": name,
                "support": seeds[0][index]["support"],
                "recall": [classes[index]["recall"] for classes in seeds],
            }
            for index, name in enumerate(class_names)
        ],
    }


def describe_selection(setup: RunSetup) -> str:
    """In words: how the parameters were chosen whose test accuracy is reported."""
    recipe = setup.recipe
    if recipe.protocol == "paper":
        return (
            "the paper's protocol: trained on all training data, test accuracy of the last epoch; best_on_test is "
            "selected on the test split"
        )
    if "validation" not in setup.splits:
        return "last epoch, trained on all training data"
    held = setup.splits["validation"].count
    again = ", then trained again on all training data for as many epochs" if recipe.retrain else ""
    by = " by balanced accuracy" if selected_by(recipe) == "balanced_accuracy" else ""
    return f"best epoch{by} on {held} held-out training examples{again}"


def published_accuracy(setup: RunSetup) -> float | None:
    """The paper's figure, where the run is on the data set that it was measured on; None for other data."""
    card, data = setup.recipe.card, setup.recipe.data
    known = CATALOGUE.get(data.name.split(":")[0])
    sizes = (setup.examples.count, setup.splits["test"].count)
    is_it = known is not None and known.row == card.row and (data.path is None or known.sizes == sizes)
    return card.published_accuracy if is_it else None


def describe_result(result: dict[str, Any]) -> str:
    """A line or two for the terminal."""
    lines = [f"test accuracy {_percent(result['test_accuracy'])}  ({result['selection']})"]
    if "best_on_test_accuracy" in result:
        best = _percent(result["best_on_test_accuracy"])
        lines.append(f"best on test  {best}  (selected on the test split: not an estimate of accuracy on new data)")
    lines += _worst_classes(result)
    if result["published_accuracy_percent"] is not None:
        lines.append(f"the paper reports {result['published_accuracy_percent']} % for this row")
    return "\n".join(lines)


def _worst_classes(result: dict[str, Any]) -> list[str]:
    """The classes at a glance, the worst first; nothing of a run of before result.json had them, or of one class."""
    classes = [
        (float(np.mean(each["recall"])), each["support"], each["name"])
        for each in result.get("test_classes", [])
        if each["support"] and None not in each["recall"]
    ]
    if len(classes) < 2 or "test_balanced_accuracy" not in result:
        return []
    shown = sorted(classes, key=lambda each: each[0])[:_MOST_CLASSES]
    width = max(len(printable(name)) for _, _, name in shown)
    balanced = f"{_percent(result['test_balanced_accuracy'])}{without_examples(result['test_classes'])}"
    lines = [f"balanced accuracy {balanced}; classes recognised, worst first:"]
    lines += [
        f"  {printable(name).ljust(width)}  {100 * recall:6.2f} % of {support:,}" for recall, support, name in shown
    ]
    if left := len(classes) - len(shown):
        least = 100 * sorted(classes)[_MOST_CLASSES][0]
        lines.append(f"  and {left} more classes{' at 100 %' if least == 100 else f', each {least:.2f} % or more'}")
    return lines


def _percent(values: dict[str, Any]) -> str:
    mean = f"{100 * values['mean']:.2f} %"
    if values["std"] is None:
        return mean
    return f"{mean} ± {100 * values['std']:.2f} (std of {len(values['each'])} seeds)"


def best_seed_index(config: dict[str, Any], result: dict[str, Any] | None, metrics: list[dict[str, Any]]) -> int:
    """Index of the seed that does best on validation, as epochs are selected (see `improves`); of equals the first.

    Without validation it is the first; nothing is ever chosen on test.
    """
    if config["num_seeds"] == 1:
        return 0
    try:
        for name in ("validation_balanced_accuracy", "validation_accuracy"):
            if result is not None and name in result:
                accuracies = [result[name]["each"]]
                losses = [
                    result["validation_loss"]["each"] if "validation_loss" in result else [0.0] * len(accuracies[0])
                ]
                return _best_of(accuracies, losses)
        balances = any("validation_balanced_accuracy" in line for line in metrics)
        name = "validation_balanced_accuracy" if balances else "validation_accuracy"
        evaluated = [line for line in metrics if name in line]
        accuracies, losses = (
            np.asarray([line[key] for line in evaluated], float).reshape(-1, config["num_seeds"]).tolist()
            for key in (name, "validation_loss")
        )
        return _best_of(accuracies, losses)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError("the run's result.json or metrics.jsonl is damaged; say which seed with --seed-index") from error


def _best_of(accuracies: list[list[float]], losses: list[list[float]]) -> int:
    """The seed with the best epoch, of accuracies and losses by epoch and seed; 0 where there is no epoch."""
    seeds = [max(zip(*seed, strict=True)) for seed in zip(np.transpose(accuracies), -np.transpose(losses), strict=True)]
    return seeds.index(max(seeds)) if seeds else 0


def selected_checksum(selected: Any) -> str:
    """A checksum of the parameters and running statistics that a result is of, those of all seeds."""
    return json_checksum({name: tree_checksums(selected.get(name, {})) for name in ("params", "batch_stats")})


def leading_seed(trees: Any, index: int, num_seeds: int) -> Any:
    """The trees of one seed out of a checkpoint's."""
    return trees if num_seeds == 1 else jax.tree.map(lambda leaf: leaf[index], trees)
