"""Print the results table, as Markdown, from the result.json files that lie beside this script.

python results/table.py > results/README.md   (the README's table is its first section)
"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
HEADER = """# Results

Every row is a run; its `result.json` is in the folder in the last column. "paper" is the figure in the paper. "ours"
is the mean ± standard deviation over seeds, in percent of the test split. Seconds are those of training and
evaluation of all seeds together, without imports and compilation. Seeds that were separate runs each have a
`result_seed_K.json`.

- `runs/fruits/features.npz` is made by the command of fruits360-119-frozen. That data is 119 of 120 classes, with 40
  pictures of each for training and 20 for testing. caltech101-frozen tests on a fifth of each class. Neither is the
  paper's split.
- `caltech101/1.0.0` is made by `pspinal-jax prepare caltech101 --raw DIR`: 30 photographs of each class for training.
- The commands with `--cache-features` are as they were run, when the head was progressive and trained by SGD. Today's
  default is a linear layer; docs/photographs_measured.md has the flags for the former.
- [kills](kills/README.md) has a separate table of 50 moments at which runs were killed.
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
