"""The evidence of docs/which_head.md: runs `compare` on every set, and makes the table of what is there.

python results/which_head.py run [NAME ..] [--shared ../shared/data]   # or go on; finished trials are kept
python results/which_head.py table                                     # into docs/which_head.md, from compare.json

Each set's work directory is results/compare-NAME. The protocol is in docs/which_head.md and was written first.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "which_head.md"
HEADS = ("progressive", "spinal", "mlp", "dense")
PIXELS = "--layer-width 128"
SETS = {
    "mnist": f"mnist.npz {PIXELS} --epochs 10",
    "kmnist": f"kmnist.npz {PIXELS} --epochs 10",
    "emnist-letters-part": f"emnist_letters_part.npz {PIXELS} --splits 3",
    "digits": f"digits.npz {PIXELS} --splits 3",
    "caltech101-features": "caltech101_features_efficientnet_lite0.npz --splits 3",
    "fruits360-features": "fruits360_119",
    "breast-cancer": "breast_cancer.npz --splits 3",
    "wine": "wine.npz --splits 3 --batch-size 32",
    "iris": "iris.npz --splits 3 --batch-size 32",
}
"""Name -> the data and the flags that differ from the defaults of `compare`."""
BUNDLED = ("digits", "breast_cancer", "wine", "iris")


def write_bundled(name: str, folder: Path) -> None:
    """One of scikit-learn's sets as an .npz file: a fifth of each class, drawn by seed 0, is the first test split."""
    from sklearn import datasets

    from pspinal_jax.data.dataset import split_by_class

    bunch = getattr(datasets, f"load_{name}")()
    features, labels = bunch.data.astype(np.float32), bunch.target.astype(np.int64)
    train, test = split_by_class(labels, 0.2, 0)
    arrays = {"train_images": features[train], "train_labels": labels[train]}
    np.savez(folder / f"{name}.npz", **arrays, test_images=features[test], test_labels=labels[test])


def run(names: list[str], shared: Path) -> None:
    """Compare on the sets of these names, one after the other."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in names or SETS:
            source, *flags = shlex.split(SETS[name])
            path = shared / source
            if source.removesuffix(".npz") in BUNDLED:
                write_bundled(source.removesuffix(".npz"), folder)
                path = folder / source
            elif not source.endswith(".npz"):
                with zipfile.ZipFile(shared / f"{source}.zip") as archive:
                    archive.extractall(folder / source)
                (path,) = [found.parent for found in (folder / source).rglob("train") if found.is_dir()]
            command = [sys.executable, "-m", "pspinal_jax", "compare", str(path), *flags]
            print(f"{name}: {shlex.join(command[2:])}", flush=True)
            # Named from the project's root, as the results tell the command.
            workdir = str((HERE / f"compare-{name}").relative_to(HERE.parent))
            subprocess.run([*command, "--workdir", workdir], check=True, cwd=HERE.parent)


def outcome(difference: dict) -> str:
    """A win, a loss or a tie, by the interval."""
    if not difference["beyond_the_noise"]:
        return "tie"
    return "win" if difference["mean"] > 0 else "loss"


def table(found: dict[str, dict]) -> str:
    """Markdown: a line a set, then wins, ties and losses of every head against dense, and of this one against each."""
    methods = (*HEADS, "knn", "ridge")
    lines = [f"| set | train, test, D, C | {' | '.join(methods)} | progressive to dense | seconds |"]
    lines.append("|" + "---|" * (len(methods) + 4))
    for name, result in found.items():
        data, cells = result["data"], []
        for method in methods:
            test = result["methods"][method]["test_accuracy"]
            text = f"{100 * test['mean']:.2f} ± {100 * test['std']:.2f}"
            cells.append(f"**{text}**" if method == result["best_on_validation"] else text)
        difference = result["all_differences"]["to_dense"]["progressive"]
        low, high = difference["interval_95"]
        sizes = f"{data['train']:,}, {data['test']:,}, {data['features']}, {data['classes']}"
        change = f"{100 * difference['mean']:+.2f} ({100 * low:+.2f} .. {100 * high:+.2f}) {outcome(difference)}"
        seconds = sum(result["execution"]["seconds"].values())
        lines.append(
            f"| [{name}](../results/compare-{name}/compare.md) | {sizes} | {' | '.join(cells)} | {change} | "
            f"{seconds:.0f} |"
        )
    counts = ["", "| | wins | ties | losses | mean difference, points |", "|---|---|---|---|---|"]
    pairs = [(head, "dense") for head in HEADS[:3]] + [
        ("progressive", other) for other in ("spinal", "mlp", "knn", "ridge")
    ]
    for ours, other in pairs:
        each = [result["all_differences"][f"to_{other}"][ours] for result in found.values()]
        outcomes = [outcome(one) for one in each]
        mean = 100 * sum(one["mean"] for one in each) / len(each)
        numbers = " | ".join(str(outcomes.count(kind)) for kind in ("win", "tie", "loss"))
        counts.append(f"| {ours} against {other} | {numbers} | {mean:+.2f} |")
    costs = ["", "| set | " + " | ".join(f"{head}: parameters, seconds" for head in HEADS) + " |", "|" + "---|" * 5]
    for name, result in found.items():
        cells = [f"{result['methods'][h]['parameters']:,}, {result['execution']['seconds'][h]:.0f}" for h in HEADS]
        costs.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *counts, *costs])


def write_table() -> None:
    """Put the table between the marks of the page."""
    paths = {name: HERE / f"compare-{name}" / "compare.json" for name in SETS}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    missing = [name for name in SETS if name not in found]
    text = table(found) if found else "No set has been run yet."
    if missing:
        text += f"\n\nNot run: {', '.join(missing)}."
    marks = r"(<!-- table -->\n).*?(<!-- end -->)"
    PAGE.write_text(re.sub(marks, lambda match: f"{match[1]}\n{text}\n\n{match[2]}", PAGE.read_text(), flags=re.DOTALL))


def main() -> None:
    """Do what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("names", nargs="*", choices=[[], *SETS], default=[])
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared" / "data")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.names, arguments.shared)
    write_table()


if __name__ == "__main__":
    main()
