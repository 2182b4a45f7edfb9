"""The outcome of a comparison: paired differences, the table, a summary; compare.json, compare.md and compare.png."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.comparison.intervals import LEVEL, MIN_UNITS, paired_intervals, winners_of_draws
from pspinal_jax.comparison.metrics import DISPLAYS, Display, by_example
from pspinal_jax.comparison.search import Comparer, rank
from pspinal_jax.comparison.settings import HEADS, Metric
from pspinal_jax.environment import device, versions
from pspinal_jax.errors import printable
from pspinal_jax.files import write_json, write_text
from pspinal_jax.pictures import drawable, drawn, plain_text

BASELINE_NAMES = {
    "logistic": "logistic regression",
    "lda": "linear discriminants",
    "nearest_mean": "nearest class mean",
    "knn": "k nearest neighbours",
    "ridge": "ridge regression",
}
LINEAR = ("logistic", "lda", "nearest_mean", "ridge")


def make_result(comparer: Comparer, command: str) -> dict[str, Any]:
    """The contents of compare.json; all but 'execution' is the same however often the work was interrupted."""
    config, methods, data, trainer = comparer.config, comparer.methods, comparer.data, comparer.trainers["seed"]
    values = {name: _values(comparer, name) for name in methods}
    rows = {name: _method(comparer, name, values[name]) for name in methods}
    chosen_from = [name for name in methods if name not in comparer.averages]
    best = max(chosen_from, key=lambda method: rows[method]["validation_accuracy"]["mean"])
    compared = {name: each[config.metric] for name, each in values.items()}
    for name, head in comparer.averages.items():  # an average has no seeds, but not less of their luck than their mean
        compared[name] = compared[name] + compared[head] - compared[head].mean(1, keepdims=True)
    tests = np.stack([split.test for split in comparer.splits])
    rounding = DISPLAYS[config.metric].of_one_example / tests.shape[1]
    intervals = paired_intervals(np.stack(list(compared.values())), tests, _tuning_luck(comparer), rounding)
    design = describe_design(config.splits, config.num_seeds, len(methods), config.metric)

    def difference(method: str, goal: str) -> dict[str, Any]:
        at = methods.index(method), methods.index(goal)
        mean, half = (float(each[at]) for each in (intervals.mean, intervals.half_width))
        beyond = design["claims"] and abs(mean) > half
        error = float(intervals.standard_error[at])
        ends = [mean - half, mean + half]
        return {"mean": mean, "interval_95": ends, "beyond_the_noise": beyond, "standard_error": error}

    pairs = {f"to_{goal}": {name: difference(name, goal) for name in methods if name != goal} for goal in methods}
    differences = {f"to_{goal}": pairs[f"to_{goal}"] for goal in dict.fromkeys((best, "dense")) if goal in methods}
    train, validation = comparer.rows[0, 0]
    counts = dict.fromkeys(comparer.trainers, config.num_seeds) | {"trial": config.trials}
    seconds = dict.fromkeys(methods, 0.0)
    for key, record in comparer.log.records.items():  # of all its trainings, whichever process did them
        if key.method in seconds and key.number < counts.get(key.kind, 0) and key.split < config.splits:
            seconds[key.method] += record["seconds"]
    each = [trainer for kind, trainer in comparer.trainers.items() if kind != "trial"]
    return {
        "command": command,
        "data": {
            "source": data.source,
            "fingerprint": data.fingerprint(),
            "features": data.example_shape[0],
            "classes": data.num_classes,
            "train": len(train),
            "validation": len(validation),
            "test": len(comparer.splits[0].test),
        },
        "copies": comparer.copies[0],
        "protocol": comparer.identity()
        | {name: getattr(config, name) for name in ("trials", "num_seeds", "splits")}
        | {"refit": comparer.final == "refit"},
        "methods": rows,
        "best_on_validation": best,
        "differences": differences,
        "all_differences": pairs,
        "intervals": design,
        "in_words": summarize(rows, differences, best, design),
        "execution": {
            "seconds": {method: round(value, 2) for method, value in seconds.items()},
            "wall_seconds_of_the_last_start": comparer.seconds,
            "compilations": {head: sum(one.compilations[head] for one in each) for head in config.heads},
            "mode": trainer.mode,
            "engine": config.engine,
            "workers": trainer.workers if trainer.mode == "loop" else None,
            "slots": dict.fromkeys(config.heads, trainer.slots),
            "device": device(),
            "versions": versions(),
        },
    }


def _values(comparer: Comparer, method: str) -> dict[Metric, np.ndarray]:
    """What test examples add to each metric, [K, S, T]; in a comparison of an earlier version to accuracy alone."""
    answers, metrics = comparer.answers(method), tuple(DISPLAYS)
    return {metric: by_example(metric, answers) for metric in (metrics[:1] if comparer.log.earlier else metrics)}


def _method(comparer: Comparer, method: str, values: Mapping[Metric, np.ndarray]) -> dict[str, Any]:
    """A method's row in compare.json; `values` as of `_values`."""
    config, data, head = comparer.config, comparer.data, comparer.averages.get(method, method)
    chosen = []
    for split in range(config.splits):
        record = comparer.record("trial", split, head, comparer.choices.get((split, head), 0))
        fields = ("setting", "validation_accuracy")
        chosen.append({"trial": record["number"]} | {name: record[name] for name in fields})
    runs = [
        comparer.record("seed", split, head, seed)
        for split, seed in itertools.product(range(config.splits), range(config.num_seeds))
    ]
    finals = [record for each in comparer.final_records(method) for record in each]
    module, size = comparer.heads.get(head), comparer.sizes.get(head)
    layers, width = getattr(module, "num_layers", 1), getattr(module, "layer_width", None)
    hidden = f"{layers} hidden layer{'s' if layers > 1 else ''} of {width}" if width else "no hidden layer"
    averaged, refitted = method in comparer.averages, comparer.final == "refit"
    if head in LINEAR:
        size = (data.example_shape[0] + 1) * data.num_classes
    elif averaged and size is not None:
        size *= config.num_seeds
    accuracies = {name: [record[f"{name}_accuracy"] for record in runs] for name in ("validation", "test")}
    before = {name: {"mean": float(np.mean(each)), "each": each} for name, each in accuracies.items()}
    trainings = len(comparer.final_numbers(method))  # where there is one for all seeds, `values` repeat it
    tests = {metric: _spread(each[:, :trainings].mean(-1).ravel()) for metric, each in values.items()}
    return {
        "parameters": size,
        "hidden": BASELINE_NAMES.get(method, "estimator" if head in comparer.grids else hidden),
        "chosen": chosen,
        "settings_tried": len(comparer.grids.get(head, range(config.trials))),
        "train_examples": len(comparer.splits[0].pool if refitted else comparer.rows[0, 0][0]),
        "validation_accuracy": None if averaged else before["validation"],
        "test_accuracy": tests["accuracy"],
        "test_metrics": tests,
        # What the trainings on the training part alone have on the test.
        **({"test_accuracy_before_refit": before["test"]} if refitted and not averaged else {}),
        "finite": all(record.get("finite", True) for record in runs + finals),
    }


def _spread(each: np.ndarray) -> dict[str, Any]:
    std = float(each.std(ddof=1)) if len(each) > 1 else 0.0
    return {"mean": float(each.mean()), "std": std, "each": each.tolist()}


def _tuning_luck(comparer: Comparer) -> np.ndarray:
    """What validation says of the winners in draws of the trials, [M, K, B]; baselines try all that there is to try.

    By accuracy or, of log-likelihood, by the loss; nothing is known of calibration.
    """
    config, shape = comparer.config, (len(comparer.methods), comparer.config.splits, comparer.config.trials)
    score = {"log_likelihood": "validation_loss", "calibration_error": "none"}.get(config.metric, "validation_accuracy")
    scores, order = np.zeros(shape), np.zeros(shape, int) + np.arange(config.trials)
    heads = dict(zip(config.heads, config.heads, strict=True)) | comparer.averages
    for (method, head), split in itertools.product(heads.items(), range(config.splits)):
        tried = [comparer.record("trial", split, head, trial) for trial in range(config.trials)]
        at = comparer.methods.index(method), split
        scores[at] = np.nan_to_num([record.get(score) or 0.0 for record in tried])
        order[at] = sorted(range(config.trials), key=lambda trial: rank(tried[trial]), reverse=True)
    return winners_of_draws(scores, order)


def describe_design(splits: int, seeds: int, methods: int, metric: Metric = "accuracy") -> dict[str, Any]:
    """What intervals are of, and whether so few splits or seeds allow to claim anything; as in compare.json."""
    units, of = (splits, "splits") if splits > 1 else (seeds, "seeds of one split")
    design = {"metric": metric, "level": LEVEL, "pairs_at_once": methods * (methods - 1) // 2}
    return design | {"units": units, "of": of, "claims": units >= MIN_UNITS}


def _metric(result: Mapping[str, Any]) -> Metric:
    """By which methods are compared; in earlier versions always accuracy."""
    found: Metric = result.get("intervals", {}).get("metric", "accuracy")
    return found


def _tests(row: Mapping[str, Any]) -> dict[Metric, Any]:
    """The metrics of a method, of which earlier versions had one."""
    found: dict[Metric, Any] = row.get("test_metrics", {"accuracy": row["test_accuracy"]})
    return found


def summarize(rows: Mapping[str, Any], differences: Mapping[str, Any], best: str, design: Mapping[str, Any]) -> str:
    """The result as sentences; `design` as of `describe_design`."""
    heads = {name: each for name, each in differences.get("to_dense", {}).items() if name in HEADS}
    display = DISPLAYS[design["metric"]]
    better, worse = _listed(heads, 1, display), _listed(heads, -1, display)
    level, beyond = (_listed(differences[f"to_{best}"], sign, display) for sign in (0, 1))
    score = display.shown(rows[best]["test_metrics"][design["metric"]]["mean"])
    named = "" if design["metric"] == "accuracy" else f" {display.name}"
    winner = f"Best on validation is {best}, with {score} {display.unit}{named} on the test."
    if not design["claims"]:
        few = f"{design['units']} {design['of']}".replace("1 seeds", "1 seed")
        return (
            f"{winner} Nothing is claimed of differences: {few} cannot tell luck from skill; "
            f"it takes {MIN_UNITS} splits, or {MIN_UNITS} seeds of one."
        )
    sentences = [
        better and f"Better than dense beyond the noise: {better}.",
        worse and f"Worse than dense beyond the noise: {worse}.",
        "No head is better than dense beyond the noise." if heads and not better else "",
        winner,
        f"Within the noise of it: {level or 'nothing else'}.",
        beyond and f"On the test beyond it: {beyond}.",
        ""
        if design["of"] == "splits"
        else f"This is of one split: other training examples may say otherwise, which {MIN_UNITS} splits or more show.",
    ]
    return " ".join(filter(None, sentences))


def _listed(differences: Mapping[str, Any], sign: int, display: Display) -> str:
    """What is beyond the noise better (1) or worse (-1), or within it (0)."""
    signs = {
        name: each["beyond_the_noise"] * np.sign(each["mean"]) * display.better for name, each in differences.items()
    }
    return ", ".join(f"{name} ({_points(differences[name], display)})" for name in signs if signs[name] == sign)


def _points(difference: Mapping[str, Any], display: Display) -> str:
    mean, low, high = (display.shown(value, "+") for value in (difference["mean"], *difference["interval_95"]))
    return f"{mean}, {low} .. {high}"


def describe_setting(chosen: list[dict[str, Any]]) -> str:
    """The setting that was chosen, or those of several splits."""
    names = {"learning_rate": "lr", "weight_decay": "wd", "dropout_rate": "dropout", "label_smoothing": "smoothing"}
    names |= {"standardize": "scaling"}
    texts = []
    for choice in chosen:
        values = {names.get(name, name): value for name, value in choice["setting"].items()}
        texts.append(", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))
    return " / ".join(dict.fromkeys(texts))


def _table(result: Mapping[str, Any], goals: Sequence[str], best_name: str) -> list[list[str]]:
    """Header and rows; `best_name` formats the name of what did best on validation."""
    header = ["", "hidden layers", "parameters", "tried", "chosen setting", "trained on", "validation %", "test %"]
    display = DISPLAYS[_metric(result)]
    shown: tuple[Metric, ...] = tuple(dict.fromkeys(("accuracy", _metric(result))))
    header += [f"test {DISPLAYS[metric].name}, {DISPLAYS[metric].unit}" for metric in shown[1:]]
    rows = [[*header, "seconds", *(f"difference to {goal.removeprefix('to_')}, 95 % interval" for goal in goals)]]
    for name, row in result["methods"].items():
        tests, differences = _tests(row), [result["differences"][goal].get(name) for goal in goals]
        validation = row["validation_accuracy"]
        rows.append(
            [
                best_name.format(name) if name == result["best_on_validation"] else name,
                row["hidden"] if "hidden layer" in row["hidden"] else "-",
                "-" if row["parameters"] is None else f"{row['parameters']:,}",
                str(row.get("settings_tried", "-")),  # which earlier versions did not write
                describe_setting(row["chosen"]),
                f"{row.get('train_examples', result['data']['train']):,}",
                "-" if validation is None else f"{100 * validation['mean']:.2f}",
                *(" ± ".join(DISPLAYS[each].shown(tests[each][value]) for value in ("mean", "std")) for each in shown),
                f"{result['execution']['seconds'][name]:.0f}",
                *("" if each is None else _points(each, display) for each in differences),
            ]
        )
    return rows


def format_table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: the table, the summary, and what it was measured on."""
    data, protocol, execution = result["data"], result["protocol"], result["execution"]
    display = DISPLAYS[_metric(result)]
    header, *rows = (f"| {' | '.join(cells)} |" for cells in _table(result, list(result["differences"]), "**{}**"))
    validated = "a validation split of its own" if protocol["own_validation"] else "validation cut anew for every seed"
    after = "then trained on both" if protocol.get("refit") else "not trained on validation examples"
    pairs = result.get("intervals")  # earlier versions had intervals of each pair by itself
    of = "" if pairs is None else f" of all {pairs['pairs_at_once']} pairs hold at once, over {pairs['of']}"
    notes = [
        result["in_words"],
        f"{data['source']}: {data['features']} features, {data['classes']} classes; {data['train']} examples to train, "
        f"{data['validation']} to validate, {data['test']} to test; {validated}; {after}. "
        f"Trials a head: {protocol['trials']}; "
        f"seeds of the best: {protocol['num_seeds']}; splits: {protocol['splits']}; epochs: {protocol['epochs']}; "
        f"batch: {protocol['batch_size']}; sizes: {protocol['match']}. In bold: best on validation. Differences in "
        f"{display.points} of test {display.name}; intervals{of or ' are over splits, seeds'}, test examples"
        f"{' and the luck of the tuning' if of else ''}. An average is of the probabilities of all seeds.",
        f"{execution['device']['kind']}, jax {execution['versions']['jax']}; {_compiled(result)}. "
        f"`{result['command']}`",
    ]
    table = "\n".join([header, "|" + "---|" * (header.count("|") - 1), *rows])
    return "\n\n".join([table, *map(printable, notes)])


def format_html(result: Mapping[str, Any]) -> str:
    """The table and the summary, for a notebook."""
    table = _table(result, list(result["differences"]), "{} *")
    rows = (f"<tr>{''.join(f'<td>{escape(printable(cell))}</td>' for cell in row)}</tr>" for row in table)
    return f"<table>{''.join(rows)}</table><p>{escape(printable(result['in_words']))}</p>"


def list_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the table says of each method, by name, accuracies 0 .. 1, and all metrics."""
    return [
        {
            "method": name,
            "test_accuracy": row["test_accuracy"]["mean"],
            "test_std": row["test_accuracy"]["std"],
            **{f"test_{metric}": score["mean"] for metric, score in _tests(row).items()},
            "validation_accuracy": (row["validation_accuracy"] or {}).get("mean"),
            "parameters": row["parameters"],
            "settings_tried": row.get("settings_tried"),
            "setting": describe_setting(row["chosen"]),
            "train_examples": row.get("train_examples", result["data"]["train"]),
            "seconds": result["execution"]["seconds"][name],
        }
        for name, row in result["methods"].items()
    ]


def _compiled(result: Mapping[str, Any]) -> str:
    return "programs compiled: " + ", ".join(f"{k} {v}" for k, v in result["execution"]["compilations"].items())


def format_terminal(result: Mapping[str, Any]) -> str:
    """The same for a terminal: fewer columns, aligned."""
    rows = [row[:1] + row[2:] for row in _table(result, list(result["differences"])[-1:], "{} *")]
    rows = [[textwrap.shorten(cell, 64, placeholder=" ..") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", result["in_words"], _compiled(result)])


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
    names, display = list(result["methods"])[::-1], DISPLAYS[_metric(result)]
    first, *others = figure.subplots(1, 1 + len(result["differences"]), sharey=True, squeeze=False)[0]
    for height, name in enumerate(names):
        test = _tests(result["methods"][name])[_metric(result)]
        values = [display.scale * value for value in test["each"]]
        first.plot(values, height + np.linspace(-0.18, 0.18, len(values)), ".", color="#4878a8", markersize=6)
        first.plot(display.scale * test["mean"], height, "|", color="black", markersize=16)
    first.set_yticks(range(len(names)), names)
    first.set_xlabel(f"test {display.name}, {display.unit}; a point a seed")
    for axis, (goal, differences) in zip(others, result["differences"].items(), strict=True):
        for name, each in differences.items():
            height, color = names.index(name), "#b04a3a" if each["beyond_the_noise"] else "#4878a8"
            axis.plot(display.scale * np.array(each["interval_95"]), [height, height], color=color, linewidth=2)
            axis.plot(display.scale * each["mean"], height, "o", color=color, markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"{display.points} {goal.replace('_', ' ')}, 95 % interval")
    figure.suptitle(drawable(Path(result["data"]["source"]).name), fontsize=10)
