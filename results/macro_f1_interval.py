"""How often a 95 % interval of macro F1 holds the true one: python results/macro_f1_interval.py

A classifier is a table of probabilities (true class, predicted class), so its macro F1 is known. Test sets are drawn
from it: "fixed" has as many examples of each class, "random" draws all at random, "uneven" has few of some classes and
many of others. Each test set gets the interval that `evaluate` writes and the bootstrap's percentiles, which it wrote
before. Printed is the share of test sets whose interval holds the macro F1 of the classes that have examples, and the
mean width in points; where classes have too few examples, `evaluate` leaves the interval out.
"""

import argparse

import numpy as np

from pspinal_jax.runs.scores import LEVEL, bootstrap
from pspinal_jax.runs.scores import _macro_f1_interval as macro_f1_interval

SETTINGS = [
    (classes, members, accuracy, design)
    for classes, members in ((2, 20), (10, 10), (10, 100), (20, 3), (100, 5), (100, 20), (400, 5))
    for accuracy in (0.6, 0.9, 0.97)
    for design in ("fixed", "random", "uneven")
]
HELD_OUT = [
    (classes, members, accuracy, design)
    for classes, members in ((3, 15), (50, 6), (150, 5), (250, 8), (600, 6))
    for accuracy in (0.5, 0.75, 0.85)
    for design in ("fixed", "random", "uneven")
]


def population(classes: int, accuracy: float, rng: np.random.Generator) -> np.ndarray:
    """Probabilities [C, C] of predictions given the class: recalls differ, and errors go to three other classes."""
    recall = np.clip(rng.beta(8 * accuracy, 8 * (1 - accuracy), classes), 0.02, 0.995)
    rows = np.diag(recall)
    for step, share in ((1, 0.6), (2, 0.3), (3, 0.1)):
        other = (np.arange(classes) + (step if classes > 3 else 1)) % classes
        rows[np.arange(classes), other] += (1 - recall) * share
    return rows


def coverage(classes: int, members: int, accuracy: float, design: str, repeats: int) -> list[str]:
    """Share that holds the truth and width: of the percentiles, and of ours."""
    rng = np.random.default_rng([classes, members, round(100 * accuracy)])
    rows = population(classes, accuracy, rng)
    sizes = np.full(classes, members)
    if design == "uneven":
        share = rng.lognormal(0, 1, classes)
        sizes = np.maximum(1, np.round(members * classes * share / share.sum())).astype(int)
    rows = rows * (sizes / sizes.sum())[:, None]
    each = 2 * np.diag(rows) / (rows.sum(1) + rows.sum(0))
    found: tuple[list, list] = ([], [])
    for _ in range(repeats):
        if design == "random":
            drawn = rng.multinomial(sizes.sum(), rows.ravel()).reshape(rows.shape)
        else:
            drawn = np.stack([rng.multinomial(size, row / row.sum()) for size, row in zip(sizes, rows, strict=True)])
        true = each[drawn.sum(1) > 0].mean()
        _, f1 = bootstrap(drawn)
        percentiles = np.percentile(f1, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        for held, interval in zip(found, (percentiles, macro_f1_interval(drawn, f1)), strict=True):
            if interval is not None:
                held.append((interval[0] <= true <= interval[1], interval[1] - interval[0]))
    means = [100 * np.mean(held, axis=0) if len(held) > repeats / 2 else None for held in found]
    cells = [("left out", "") if mean is None else (f"{mean[0]:.0f} %", f"{mean[1]:.1f}") for mean in means]
    return [*cells[0], *cells[1]]


def main() -> None:
    """Print the table, a line a setting."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--held-out", action="store_true", help="settings that the method was not chosen by")
    arguments = parser.parse_args()
    print("| classes | examples of each | accuracy | test set | percentiles | width | evaluate | width |")
    print("|---|---|---|---|---|---|---|---|")
    for classes, members, accuracy, design in HELD_OUT if arguments.held_out else SETTINGS:
        cells = coverage(classes, members, accuracy, design, arguments.repeats)
        print("|", " | ".join(map(str, (classes, members, accuracy, design, *cells))), "|", flush=True)


if __name__ == "__main__":
    main()
