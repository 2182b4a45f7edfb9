"""What a comparison says: the table, paired differences, a sentence; compare.json, compare.md and compare.png."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.comparison.heads import describe_head
from pspinal_jax.comparison.ledger import Key, unpacked
from pspinal_jax.comparison.run import Comparer
from pspinal_jax.comparison.statistics import bootstrap_means, interval_95, spread
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import printable
from pspinal_jax.files import write_json, write_text
from pspinal_jax.pictures import drawable, drawn, plain_text

FLOOR_NAMES = {"knn": "k nearest neighbours", "ridge": "ridge regression"}


def make_result(comparer: Comparer, command: str) -> dict[str, Any]:
    """What compare.json holds; all but its 'execution' is the same however often the work was interrupted."""
    config, lines, methods = comparer.config, comparer.ledger.lines, comparer.methods
    units = [(split, seed) for split in range(config.splits) for seed in range(config.num_seeds)]
    rows: dict[str, Any] = {}
    for method in methods:
        seeds = [lines[Key("seed", split, method, seed)] for split, seed in units]
        tests = [line["test_accuracy"] for line in seeds]
        chosen = [_choice(comparer, split, method) for split in range(config.splits)]
        validation = [line["validation_accuracy"] for line in seeds]
        rows[method] = {
            "parameters": _parameters(comparer, method),
            "hidden": describe_head(comparer.heads[method]) if method in comparer.heads else FLOOR_NAMES[method],
            "chosen": chosen,
            "validation_accuracy": {"mean": float(np.mean(validation)), "each": validation},
            "test_accuracy": {"mean": float(np.mean(tests)), "std": spread(tests), "each": tests},
            "finite": all(line.get("finite", True) for line in seeds),
        }
    best = max(methods, key=lambda method: rows[method]["validation_accuracy"]["mean"])
    means = bootstrap_means(_hits(comparer, methods))
    pairs = {
        f"to_{goal}": {method: _difference(rows, means, methods, method, goal) for method in methods if method != goal}
        for goal in methods
    }
    differences = {f"to_{goal}": pairs[f"to_{goal}"] for goal in dict.fromkeys((best, "dense")) if goal in methods}
    examples, (train, validation_rows) = (
        comparer.splits[0],
        comparer.splits[0].rows(config.validation_fraction, config.seed),
    )
    return {
        "command": command,
        "data": {
            "source": comparer.source,
            "fingerprint": comparer.data.fingerprint(),
            "features": comparer.data.example_shape[0],
            "classes": comparer.data.num_classes,
            "train": len(train),
            "validation": len(validation_rows),
            "test": len(examples.test_labels),
        },
        "copies": comparer.copies[0],
        "protocol": comparer.identity()
        | {"trials": config.trials, "num_seeds": config.num_seeds, "splits": config.splits},
        "methods": rows,
        "best_on_validation": best,
        "differences": differences,
        "all_differences": pairs,
        "in_words": in_words(rows, differences, best),
        "execution": {
            "seconds": {method: _seconds(comparer, method) for method in methods},
            "wall_seconds_of_the_last_start": comparer.seconds,
            "compilations": comparer.runner.compilations,
            "mode": comparer.runner.mode,
            "workers": comparer.runner.workers if comparer.runner.mode == "loop" else None,
            "slots": comparer.runner.slots,
            "device": device(),
            "versions": versions(),
        },
    }


def _choice(comparer: Comparer, split: int, method: str) -> dict[str, Any]:
    trial = comparer.choices.get((split, method), 0)
    line = comparer.ledger.lines[Key("trial", split, method, trial)]
    return {"trial": trial, "setting": line["setting"], "validation_accuracy": line["validation_accuracy"]}


def _parameters(comparer: Comparer, method: str) -> int | None:
    if method == "ridge":
        return (comparer.data.example_shape[0] + 1) * comparer.data.num_classes
    return comparer.sizes.get(method)


def _seconds(comparer: Comparer, method: str) -> float:
    """Of all its trainings together, whichever process did them."""
    config = comparer.config
    keys = [key for key in comparer.ledger.lines if key.method == method]
    wanted = [
        key
        for key in keys
        if key.split < config.splits and key.number < (config.trials if key.kind == "trial" else config.num_seeds)
    ]
    return round(sum(comparer.ledger.lines[key]["seconds"] for key in wanted), 2)


def _hits(comparer: Comparer, methods: list[str]) -> np.ndarray:
    """Bool [methods, splits, seeds, test examples]."""
    config, count = comparer.config, len(comparer.splits[0].test_labels)

    def seeds(method: str, split: int) -> np.ndarray:
        lines = [comparer.ledger.lines[Key("seed", split, method, seed)] for seed in range(config.num_seeds)]
        return np.stack([unpacked(line["test_hits"], count) for line in lines])

    return np.stack([[seeds(method, split) for split in range(config.splits)] for method in methods])


def _difference(rows: Any, means: np.ndarray, methods: list[str], method: str, goal: str) -> dict[str, Any]:
    draws = means[:, methods.index(method)] - means[:, methods.index(goal)]
    low, high = interval_95(draws)
    mean = rows[method]["test_accuracy"]["mean"] - rows[goal]["test_accuracy"]["mean"]
    return {"mean": mean, "interval_95": [low, high], "beyond_the_noise": low > 0 or high < 0}


def in_words(rows: Mapping[str, Any], differences: Mapping[str, Any], best: str) -> str:
    """The result as sentences."""
    sentences = []
    to_dense = differences.get("to_dense", {})
    heads = {name: each for name, each in to_dense.items() if name not in FLOOR_NAMES}
    if heads:
        better = _listed(heads, lambda each: each["interval_95"][0] > 0)
        worse = _listed(heads, lambda each: each["interval_95"][1] < 0)
        if better:
            sentences.append(f"Better than dense beyond the noise: {better}.")
        if worse:
            sentences.append(f"Worse than dense beyond the noise: {worse}.")
        if not better:
            sentences.append("No head is better than dense beyond the noise.")
    level = [name for name, each in differences[f"to_{best}"].items() if not each["beyond_the_noise"]]
    beyond = _listed(differences[f"to_{best}"], lambda each: each["interval_95"][0] > 0)
    test = rows[best]["test_accuracy"]["mean"]
    words = f"Best on validation is {best}, with {100 * test:.2f} % on the test"
    words += f"; within the noise of it: {', '.join(level)}" if level else "; nothing else is within the noise of it"
    sentences.append(words + (f"; on the test beyond it: {beyond}." if beyond else "."))
    return " ".join(sentences)


def _listed(differences: Mapping[str, Any], wanted: Any) -> str:
    found = {name: each for name, each in differences.items() if wanted(each)}
    return ", ".join(f"{name} ({_points(each)})" for name, each in found.items())


def _points(difference: Mapping[str, Any]) -> str:
    low, high = difference["interval_95"]
    return f"{100 * difference['mean']:+.2f}, {100 * low:+.2f} .. {100 * high:+.2f}"


def describe_setting(chosen: list[dict[str, Any]]) -> str:
    """The setting that was chosen, or those of several splits."""
    names = {"learning_rate": "lr", "weight_decay": "wd", "dropout_rate": "dropout", "label_smoothing": "smoothing"}
    names |= {"standardize": "scaling"}
    texts = []
    for choice in chosen:
        values = {names.get(name, name): value for name, value in choice["setting"].items()}
        texts.append(", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))
    return " / ".join(dict.fromkeys(texts))


def format_table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: the table, the sentence, and what it was measured on."""
    data, protocol, execution = result["data"], result["protocol"], result["execution"]
    best, differences = result["best_on_validation"], result["differences"]
    goals = [goal.removeprefix("to_") for goal in differences]
    head = ["", "hidden layers", "parameters", "chosen setting", "validation %", "test %", "seconds"]
    head += [f"difference to {goal}, 95 % interval" for goal in goals]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, row in result["methods"].items():
        test = row["test_accuracy"]
        cells = [
            f"**{name}**" if name == best else name,
            row["hidden"] if name not in FLOOR_NAMES else "-",
            "-" if row["parameters"] is None else f"{row['parameters']:,}",
            describe_setting(row["chosen"]),
            f"{100 * row['validation_accuracy']['mean']:.2f}",
            f"{100 * test['mean']:.2f} ± {100 * test['std']:.2f}",
            f"{execution['seconds'][name]:.0f}",
        ]
        cells += [_points(differences[f"to_{goal}"][name]) if goal != name else "" for goal in goals]
        lines.append(f"| {' | '.join(cells)} |")
    compiled = ", ".join(f"{head} {count}" for head, count in execution["compilations"].items())
    validated = "a validation split of its own" if protocol["own_validation"] else "validation cut anew for every seed"
    notes = [
        result["in_words"],
        f"{data['source']}: {data['features']} features, {data['classes']} classes; {data['train']} examples to train, "
        f"{data['validation']} to validate, {data['test']} to test; {validated}. {protocol['trials']} trials a head, "
        f"then {protocol['num_seeds']} seeds of the best on {_several(protocol['splits'], 'split')}; "
        f"{protocol['epochs']} epochs, batch {protocol['batch_size']}, sizes: {protocol['match']}. In bold: best on "
        "validation. Differences in points of test accuracy; bootstrap over splits, seeds and test examples.",
        f"{execution['device']['kind']}, jax {execution['versions']['jax']}; programs compiled by the last start: "
        f"{compiled}. `{result['command']}`",
    ]
    return "\n\n".join(["\n".join(lines), *map(printable, notes)])


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


def format_terminal(result: Mapping[str, Any]) -> str:
    """The same for a terminal: fewer columns, aligned."""
    best, differences = result["best_on_validation"], result["differences"]
    goal = "to_dense" if "to_dense" in differences else f"to_{best}"
    head = [
        "",
        "parameters",
        "chosen setting",
        "validation %",
        "test %",
        "seconds",
        f"difference {goal.replace('_', ' ')}",
    ]
    rows = [head]
    for name, row in result["methods"].items():
        test = row["test_accuracy"]
        rows.append(
            [
                f"{name} *" if name == best else name,
                "-" if row["parameters"] is None else f"{row['parameters']:,}",
                textwrap.shorten(describe_setting(row["chosen"]), 64, placeholder=" .."),
                f"{100 * row['validation_accuracy']['mean']:.2f}",
                f"{100 * test['mean']:.2f} ± {100 * test['std']:.2f}",
                f"{result['execution']['seconds'][name]:.0f}",
                _points(differences[goal][name]) if name in differences[goal] else "",
            ]
        )
    widths = [max(len(row[index]) for row in rows) for index in range(len(head))]
    table = [
        "  ".join(cell.rjust(width) if index in (1, 3, 4, 5) else cell.ljust(width) for index, (cell, width) in pairs)
        for row in rows
        for pairs in [list(enumerate(zip(row, widths, strict=True)))]
    ]
    compiled = ", ".join(f"{name} {count}" for name, count in result["execution"]["compilations"].items())
    return "\n".join([*(line.rstrip() for line in table), "", result["in_words"], f"programs compiled: {compiled}"])


def write_report(workdir: Path, result: dict[str, Any]) -> None:
    """Write compare.json, compare.md and compare.png, what matters most first."""
    write_json(workdir / "compare.json", result)
    write_text(workdir / "compare.md", format_table(result) + "\n")
    with drawn(workdir / "compare.png", *_size(result)) as figure:
        _draw(result, figure)


def plot(result: Mapping[str, Any]) -> Any:
    """A matplotlib Figure: every seed a point beside the mean, and the paired differences with their intervals."""
    from matplotlib.figure import Figure

    with plain_text():
        figure = Figure(figsize=_size(result), layout="constrained")
        _draw(result, figure)
    return figure


def _size(result: Mapping[str, Any]) -> tuple[float, float]:
    return 4.6 * (1 + len(result["differences"])), 1.4 + 0.45 * len(result["methods"])


def _draw(result: Mapping[str, Any], figure: Any) -> None:
    names = list(result["methods"])[::-1]
    goals = list(result["differences"])
    axes = figure.subplots(1, 1 + len(goals), sharey=True, squeeze=False)[0]
    for place, name in enumerate(names):
        test = result["methods"][name]["test_accuracy"]
        values = [100 * value for value in test["each"]]
        axes[0].plot(values, place + np.linspace(-0.18, 0.18, len(values)), ".", color="#4878a8", markersize=6)
        axes[0].plot(100 * test["mean"], place, "|", color="black", markersize=16)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_xlabel("test accuracy, %; a point a seed")
    for axis, goal in zip(axes[1:], goals, strict=True):
        for place, name in enumerate(names):
            if name in result["differences"][goal]:
                each = result["differences"][goal][name]
                low, high = (100 * value for value in each["interval_95"])
                color = "#b04a3a" if each["beyond_the_noise"] else "#4878a8"
                axis.plot([low, high], [place, place], color=color, linewidth=2)
                axis.plot(100 * each["mean"], place, "o", color=color, markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"points {goal.replace('_', ' ')}, 95 % interval")
    figure.suptitle(drawable(Path(result["data"]["source"]).name), fontsize=10)
