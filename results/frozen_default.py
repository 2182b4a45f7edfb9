"""The table of docs/photographs.md: the default head on frozen features beside scikit-learn's LogisticRegression().

    python results/frozen_default.py CALTECH_FEATURES.npz FRUITS_FEATURES.npz [SET ..]

CALTECH_FEATURES.npz has 30 photographs of each of Caltech-101's classes to train; FRUITS_FEATURES.npz is the
features.npz of `train folder --data.path fruits360_119 --freeze backbone --cache-features`. Three splits of each set:
the first as the file has it, the others drawn anew by class. The head is trained by `pspinal_jax.train("linear", ..)`,
which is how `folder` trains it on such features; a line of JSON a training goes to standard output, the table to
standard error.
"""

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import pspinal_jax
from pspinal_jax.data.dataset import split_by_class
from pspinal_jax.runs.scores import calibration_error

NAMES = {
    "caltech": "Caltech-101, 30 a class",
    "fruits": "Fruits-119, 40 a class",
    "small": "12 small classes of Caltech-101, 30 a class",
    "digits": "digits, 64 numbers",
    "caltech4": "Caltech-101, 4 a class",
    "fruits4": "Fruits-119, 4 a class",
}


def drawn(labels, counts, seed):
    """(train, test): of each class as many at random for the test as `counts` says."""
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in range(len(counts))]
    test = np.sort(np.concatenate([rows[:count] for rows, count in zip(members, counts, strict=True)]))
    return np.setdiff1d(np.arange(len(labels)), test), test


def read(path):
    """Inputs, labels and how many of them are the file's training and validation rows."""
    with np.load(path) as file:
        parts = [name for name in ("train", "validation", "test") if f"{name}_labels" in file]
        inputs, labels = (np.concatenate([file[f"{part}_{kind}"] for part in parts]) for kind in ("images", "labels"))
        return inputs.astype(np.float32), labels.astype(np.int64), len(labels) - len(file["test_labels"])


def sets(caltech, fruits):
    """Yield (name, split, inputs, labels, train rows, test rows)."""
    for name, (inputs, labels, count) in (("caltech", read(caltech)), ("fruits", read(fruits))):
        own = np.bincount(labels[count:])
        for split in range(3):
            rows = np.split(np.arange(len(labels)), [count]) if split == 0 else drawn(labels, own, split)
            yield name, split, inputs, labels, *rows
            few = np.bincount(labels[rows[0]]) - 4
            yield f"{name}4", split, inputs, labels, rows[0][drawn(labels[rows[0]], few, 10 + split)[0]], rows[1]
        if name == "caltech":
            totals = np.bincount(labels)
            small = np.sort([label for label in np.argsort(totals, kind="stable") if totals[label] >= 40][:12])
            of_small = np.flatnonzero(np.isin(labels, small))
            among = np.searchsorted(small, labels[of_small])
            for split in range(3):
                rows = drawn(among, np.bincount(among) - 30, 20 + split)
                yield "small", split, inputs[of_small], among, *rows
    digits = load_digits()
    for split in range(3):
        rows = split_by_class(digits.target, 0.2, split)
        yield "digits", split, digits.data.astype(np.float32), digits.target, *rows


def head(place, inputs, labels, train, test):
    """Scores of the head, and seconds of processor and clock."""
    arrays = {"train_images": inputs[train], "train_labels": labels[train]}
    np.savez(place / "data.npz", **arrays, test_images=inputs[test], test_labels=labels[test])
    clock, processor = time.perf_counter(), time.process_time()
    run = pspinal_jax.train("linear", data__path=place / "data.npz", workdir=place / "run")
    seconds = time.perf_counter() - clock, time.process_time() - processor
    report = run.evaluate()
    return report["accuracy"], report["loss"], report["calibration_error"], *seconds


def logistic(inputs, labels, train, test):
    """The same of scikit-learn's LogisticRegression as it comes."""
    clock, processor = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of 100 iterations, which on the digits are too few
        model = LogisticRegression().fit(inputs[train], labels[train])
    seconds = time.perf_counter() - clock, time.process_time() - processor
    probabilities, true = model.predict_proba(inputs[test]).astype(np.float64), labels[test]
    hits = probabilities.argmax(1) == true
    likelihood = np.maximum(probabilities[np.arange(len(true)), true], 1e-30)
    calibration = calibration_error(probabilities.max(1), hits)
    return hits.mean(), -np.log(likelihood).mean(), calibration, *seconds


def cell(values):
    """Mean and standard deviation over splits of accuracy, and means of the others, as cells of the table."""
    values = np.asarray(values)
    mean = values.mean(0)
    spread = f"{100 * mean[0]:.2f} ± {100 * values[:, 0].std(ddof=1) if len(values) > 1 else 0:.2f}"
    return f"{spread} | {mean[1]:.4f} | {100 * mean[2]:.2f} | {mean[4]:.1f}"


def main():
    """Train everything and print."""
    found = {}
    caltech, fruits, *names = sys.argv[1:]
    for name, split, *data in sets(caltech, fruits):
        if name not in (names or NAMES):
            continue
        ours_first = split % 2  # other work on the machine comes and goes
        with tempfile.TemporaryDirectory() as place:
            scores = {}
            for method in ("ours", "theirs") if ours_first else ("theirs", "ours"):
                scores[method] = head(Path(place), *data) if method == "ours" else logistic(*data)
        print(
            json.dumps({"set": name, "split": split, **{k: list(map(float, v)) for k, v in scores.items()}}), flush=True
        )
        for method, each in scores.items():
            found.setdefault(name, {}).setdefault(method, []).append(each)
    for name, methods in found.items():
        print(f"| {NAMES[name]} | {cell(methods['ours'])} | {cell(methods['theirs'])} |", file=sys.stderr)


if __name__ == "__main__":
    main()
