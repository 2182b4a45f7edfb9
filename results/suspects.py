"""How many planted wrong labels the suspects find: the table in docs/unknown.md.

    python results/suspects.py CALTECH_FEATURES.npz FRUITS_FEATURES.npz

Of all examples of a file of features 5 % get another label at random, three times others; then all are ordered by how
likely their label is, and the planted ones among the first are counted.
"""

import sys
import time
from pathlib import Path

import numpy as np

from pspinal_jax.runs.suspects import out_of_fold

PLANTED = 0.05


def main():
    """Print a line of the table for each file."""
    for path in sys.argv[1:]:
        with np.load(path) as file:
            parts = [part for part in ("train", "validation", "test") if f"{part}_labels" in file]
            features = np.concatenate([file[f"{part}_images"] for part in parts]).astype(np.float32)
            true = np.concatenate([file[f"{part}_labels"] for part in parts]).astype(np.int64)
        found = []
        for seed in range(3):
            rng, count = np.random.default_rng(seed), len(true)
            planted = rng.permutation(count)[: round(PLANTED * count)]
            labels = true.copy()
            labels[planted] = (true[planted] + rng.integers(1, true.max() + 1, len(planted))) % (true.max() + 1)
            start = time.perf_counter()
            rows = out_of_fold(features, labels, np.arange(count))
            seconds = time.perf_counter() - start
            order = np.argsort(rows[np.arange(count), labels], kind="stable")
            shares = [np.isin(planted, order[: round(part * count)]).mean() for part in (0.05, 0.1)]
            right = (rows.argmax(1)[planted] == true[planted]).mean()
            found.append([*(100 * np.array([*shares, right])), seconds])
        means = np.mean(found, 0), np.std(found, 0, ddof=1)
        cells = [f"{mean:.2f} ± {std:.2f}" for mean, std in zip(*means, strict=True)]
        print(f"| {Path(path).stem} | {len(true):,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
