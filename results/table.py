"""Print the results table, as Markdown, from the result.json files that lie beside this script.

python results/table.py > results/README.md   (the README's table is its first section)
"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
HEADER = """# Results

Every line is a run whose `result.json` lies in the folder named last. "paper" is the figure that the paper reports.
Ours is mean ± standard deviation over seeds, in percent of the test split; seconds are training and evaluation of all
seeds together, without imports and compilation. Where seeds were runs of their own, each has its `result_seed_K.json`.
`runs/fruits/features.npz` is what the command of fruits360-119-frozen leaves behind; that data is 119 of 120 classes,
40 pictures of each to train and 20 to test, and caltech101-frozen tests on a fifth of each class: not the paper's.
`caltech101/1.0.0` is what `pspinal-jax prepare caltech101 --raw DIR` makes: 30 photographs of each class to train.
The commands with `--cache-features` are as they were given: the head was then progressive and trained by SGD; for
today's default, a linear layer, and the flags that ask for the former, see docs/photographs_measured.md.
Not a run but a table of its own: [kills](kills/README.md), 50 moments at which runs were killed.
"""


def percent(values: dict) -> str:
    """98.65 ± 0.04 (5 seeds)."""
    spread = "" if values["std"] is None else f" ± {100 * values['std']:.2f} ({len(values['each'])} seeds)"
    return f"{100 * values['mean']:.2f}{spread}"


def read_result(folder: Path) -> dict:
    """The folder's result.json, or what it would be for all the seeds that have a result of their own."""
    whole = folder / "result.json"
    if whole.exists():
        return json.loads(whole.read_text())
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("result_seed_*.json"))]
    each = [value for result in results for value in result["test_accuracy"]["each"]]
    spread = statistics.stdev(each) if len(each) > 1 else None
    return results[0] | {
        "test_accuracy": {"mean": statistics.mean(each), "std": spread, "each": each},
        "seconds": sum(result["seconds"] for result in results),
    }


def seconds(folder: Path, result: dict) -> str:
    """The run's seconds, or why they say nothing (seconds.txt)."""
    note = folder / "seconds.txt"
    return note.read_text().strip() if note.exists() else f"{result['seconds']:.0f}"


def row(folder: Path) -> str:
    """One line of the table."""
    result = read_result(folder)
    command = (folder / "command.txt").read_text().strip()
    published = result["published_accuracy_percent"]
    accuracy = percent(result["test_accuracy"])
    if "best_on_test_accuracy" in result:
        accuracy += f"; best on test {percent(result['best_on_test_accuracy'])}"
    cells = (
        result["recipe"],
        result["head"],
        f"{result['parameters']:,}",
        "-" if published is None else f"{published}",
        accuracy,
        result["selection"],
        seconds(folder, result),
        f"{result['device']['kind']}, jax {result['versions']['jax']}",
        f"`{command}`",
        folder.name,
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the page."""
    columns = [
        "recipe",
        "head",
        "parameters",
        "paper %",
        "ours %",
        "selection",
        "seconds",
        "hardware",
        "command",
        "folder",
    ]
    print(HEADER)
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for folder in sorted({path.parent for path in [*HERE.glob("*/result.json"), *HERE.glob("*/result_seed_*.json")]}):
        print(row(folder))
    print()
    print((HERE / "not_run.md").read_text().strip())


if __name__ == "__main__":
    main()
