"""Print the results table, as Markdown, from the result.json files that lie beside this script.

python results/table.py > results/README.md   (the README's table is its first section)
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
HEADER = """# Results

Every line is a run whose `result.json` lies in the folder named last. "paper" is the figure that the paper reports.
Ours is mean ± standard deviation over seeds, in percent of the test split; seconds are training and evaluation of all
seeds together, without imports and compilation.
"""


def percent(values: dict) -> str:
    """98.65 ± 0.04 (5 seeds)."""
    spread = "" if values["std"] is None else f" ± {100 * values['std']:.2f} ({len(values['each'])} seeds)"
    return f"{100 * values['mean']:.2f}{spread}"


def row(folder: Path) -> str:
    """One line of the table."""
    result = json.loads((folder / "result.json").read_text())
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
        f"{result['seconds']:.0f}",
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
    for folder in sorted(path.parent for path in HERE.glob("*/result.json")):
        print(row(folder))
    print()
    print((HERE / "not_run.md").read_text().strip())


if __name__ == "__main__":
    main()
