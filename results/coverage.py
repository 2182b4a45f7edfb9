"""How often the intervals of `compare` hold, and how often it calls equals different: for docs/intervals.md.

python results/coverage.py    # goes on with what is there, and writes it into results/coverage and docs/intervals.md

Heads are drawn whose true accuracies are known, and compared as `compare` does it: K splits of a data set (with five
times as many examples as a test, so that tests overlap as those of its splits do; one split is the data's own), on each
the winner of 16 trials by validation, S seeds, T test examples. Example t is got right where

    skill of the head + luck of the split + luck of the winner's setting + luck of the seed
      + ease of the example + ease for the head + chance > 0,

each part a normal number (a probit model), so that true accuracies are known. In every cell one spread is ten times
the others: of seeds, splits or settings; or all three are small, so that test examples dominate. The truth of several
splits is the mean over splits, settings, seeds and examples; of one split the same on that split, as `compare` says. A
claim is false where the truth is 0 or has the other sign. The method before this one took percentiles of a bootstrap.
"""

import argparse
import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

from pspinal_jax.comparison.intervals import MIN_UNITS, paired_intervals, winners_of_draws

HERE = Path(__file__).resolve().parent / "coverage"
PAGE = HERE.parents[1] / "docs" / "intervals.md"
SPLITS, SEEDS, TESTS = (1, 2, 3, 5), (1, 3, 5), (200, 2000)
DOMINANT = ("seed", "split", "test examples", "tuning")
LARGE, SMALL = 0.03, 0.003
"""Standard deviations of a head's accuracy by the spread that dominates, and by each that does not."""
ACCURACY, TRIALS, HEADS = 0.9, 16, 4
EASE, EASE_FOR_HEAD, CHANCE = 2.0, 0.7, 1.0  # standard deviations


def percentile_bootstrap(correct: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """The method before this one: mean accuracies [draws, M] of `correct` [M, K, S, T]."""
    methods, splits, seeds, examples = correct.shape
    rng, means = np.random.default_rng(seed), np.zeros((draws, methods))
    drawn_splits = max(1, splits - 1)
    for _ in range(drawn_splits):
        chosen = rng.integers(splits, size=draws)
        weights, seed_weights = weigh(rng, draws, examples, examples), weigh(rng, draws, seeds, max(1, seeds - 1))
        for split in np.unique(chosen):
            among = chosen == split
            accuracies = (correct[:, split].reshape(-1, examples) @ weights[among].T).reshape(methods, seeds, -1)
            means[among] += np.einsum("msb,bs->bm", accuracies, seed_weights[among]) / drawn_splits
    return means


def weigh(rng: np.random.Generator, size: int, items: int, drawn: int) -> np.ndarray:
    """Float32 [size, items]: the share of each of `items` in `drawn` draws with replacement."""
    places = rng.integers(items, size=(size, drawn)) + items * np.arange(size)[:, None]
    return (np.bincount(places.ravel(), minlength=size * items).reshape(size, items) / drawn).astype(np.float32)


class World:
    """Heads and data of one cell.

    Attributes:
      gaps: [M], how far the true accuracy of each head is from the first's, averaged over everything.
      slope: of accuracy by skill.
    """

    def __init__(self, dominant: str, gaps: np.ndarray, uneven: bool) -> None:
        total = np.sqrt(EASE**2 + EASE_FOR_HEAD**2 + CHANCE**2)
        slope = np.exp(-(ndtri(ACCURACY) ** 2) / 2) / np.sqrt(2 * np.pi) / total  # of accuracy by skill
        sizes = {name: (LARGE if name == dominant else SMALL) / slope for name in ("seed", "split", "tuning")}
        self.slope = slope
        # Where heads are uneven, the last one's luck is three times the others'.
        self.uneven = np.where(np.arange(len(gaps)) == len(gaps) - 1, 3.0, 1.0) if uneven else np.ones(len(gaps))
        self.seed, self.split, self.tuning = (sizes[name] * self.uneven for name in ("seed", "split", "tuning"))
        self.inner = np.sqrt(total**2 + self.seed**2)
        self.gaps = gaps
        self.winners = self._settings(np.random.default_rng(1), 20_000, 1)[0][:, :, 0]  # [20,000, M]
        self.skills = self._solve()

    def _settings(self, rng: np.random.Generator, count: int, splits: int) -> tuple[np.ndarray, ...]:
        """Quality of the winner [R, M, K], and what validation says of all trials, [R, M, K, N].

        Half of a setting's quality is its own, half the split's; validation sees it with noise of half its spread.
        """
        shape = (count, len(self.gaps), splits, TRIALS)
        own = rng.standard_normal((*shape[:2], 1, TRIALS)) + rng.standard_normal(shape)
        # A maximum of 16 normal numbers, chosen with noise, has 0.62 times the standard deviation of one.
        quality = own * (self.tuning / 0.62 / np.sqrt(2))[:, None, None]
        seen = quality + rng.standard_normal(shape) * (0.5 * self.tuning / 0.62)[:, None, None]
        best = seen.argmax(-1)[..., None]
        return np.take_along_axis(quality, best, -1)[..., 0], seen

    def truth(self, skills: np.ndarray, split_luck: np.ndarray | None = None) -> np.ndarray:
        """True accuracies [M], over everything or, with `split_luck` [M], on a split."""
        if split_luck is None:
            return ndtr((skills + self.winners) / np.sqrt(self.inner**2 + self.split**2)).mean(0)
        return ndtr((skills + split_luck + self.winners[:4000]) / self.inner).mean(0)

    def _solve(self) -> np.ndarray:
        """The skills that give the first head `ACCURACY`, and the others `gaps` more."""
        low, high = np.full(len(self.gaps), -20.0), np.full(len(self.gaps), 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.truth(middle) > ACCURACY + self.gaps
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return (low + high) / 2

    def draw(self, rng: np.random.Generator, splits: int, seeds: int, tests: int) -> tuple[np.ndarray, ...]:
        """(correct [M, K, S, T], tests [K, T], seen [M, K, N], truth [M])."""
        methods = len(self.gaps)
        quality, seen = (each[0] for each in self._settings(rng, 1, splits))
        luck = rng.standard_normal((methods, splits)) * self.split[:, None]
        of_seed = rng.standard_normal((methods, splits, seeds)) * self.seed[:, None, None]
        rows = np.stack([rng.permutation(5 * tests)[:tests] for _ in range(splits)])
        ease = EASE * rng.standard_normal(5 * tests) + EASE_FOR_HEAD * rng.standard_normal((methods, 5 * tests))
        skill = (self.skills[:, None] + luck + quality)[:, :, None] + of_seed
        latent = rng.standard_normal((methods, splits, seeds, tests), np.float32) * CHANCE
        correct = latent + ease[:, rows][:, :, None] + skill[..., None] > 0
        truth = self.truth(self.skills, luck[:, 0]) if splits == 1 else ACCURACY + self.gaps
        return correct, rows, seen, truth


def measure(world: World, design: tuple[int, int, int], repeats: int, old_repeats: int) -> dict[str, float]:
    """Shares of intervals that hold, alone and all at once, and of comparisons with claims; by both methods."""
    splits, seeds, tests = design
    rng, pairs = np.random.default_rng([7, *design]), np.triu_indices(len(world.gaps), 1)
    rows = []
    for number in range(repeats):
        correct, tested, seen, truth = world.draw(rng, splits, seeds, tests)
        gap = (truth[:, None] - truth)[pairs]
        tuned = winners_of_draws(seen * world.slope, (-seen).argsort(-1), 200)
        found = paired_intervals(correct, tested, tuned, 1 / tests)
        mean, half = found.mean[pairs], found.half_width[pairs]
        row = {"half_width": half.mean()} | judge(mean - half, mean + half, gap, found.units >= MIN_UNITS)
        if number < old_repeats:
            means = percentile_bootstrap(correct, 200, number)
            low, high = np.quantile(means[:, pairs[0]] - means[:, pairs[1]], [0.025, 0.975], axis=0)
            row |= {f"old_{name}": value for name, value in judge(low, high, gap, True).items()}
        rows.append(row)
    means = {name: round(float(np.mean([row[name] for row in rows if name in row])), 4) for name in rows[0]}
    return {"repeats": repeats, "old_repeats": old_repeats, **means}


def judge(low: np.ndarray, high: np.ndarray, gap: np.ndarray, claims: bool) -> dict[str, float]:
    """Of the intervals of one comparison, by true differences `gap`."""
    held = (low <= gap) & (gap <= high)
    sign = claims * (np.sign(low) + np.sign(high)) / 2 * (low * high > 0)
    large = np.abs(gap) > 0.045
    return {
        "single": held.mean(),
        "together": held.all(),
        "false": ((sign != 0) & (sign != np.sign(np.round(gap, 6)))).any(),
        "any": (sign != 0).any(),
        "found": (sign[large] != 0).mean() if large.any() else 0.0,
    }


WORLDS = {
    "equal": (np.zeros(4), False, TESTS),
    "unequal": (np.array([0.0, 0.01, 0.02, 0.05]), False, TESTS),
    "equal, one three times as noisy": (np.zeros(4), True, TESTS[:1]),
    "ten equal": (np.zeros(10), False, TESTS[:1]),
}
"""Name -> true differences to the first head, whether the last one is noisier, and sizes of the test."""


def table(cells: dict[str, dict]) -> str:
    """Markdown: for each world and spread a line a design."""
    lines = []
    for world, (_, _, sizes) in WORLDS.items():
        lines += ["", f"### {world}", "", "Each cell: new method, then in brackets the old one, in percent.", ""]
        lines += ["| dominant | splits, seeds, tests | single intervals that hold | all at once | comparisons with a "]
        lines[-1] += "false claim | 5 points found | half width, points |"
        lines.append("|---|---|---|---|---|---|---|")
        for dominant, *design in itertools.product(DOMINANT, SPLITS, SEEDS, sizes):
            cell = cells.get(key(world, dominant, tuple(design)))
            if cell is None:
                continue
            texts = [f"{100 * cell[name]:.1f} ({100 * cell['old_' + name]:.0f})" for name in ("single", "together")]
            said = claimable(*design[:2])
            false, found = (f"{100 * cell[name]:.1f}" if said else "no claims" for name in ("false", "found"))
            texts.append(f"{false} ({100 * cell['old_false']:.0f})")
            texts.append(f"{found} ({100 * cell['old_found']:.0f})" if world == "unequal" else "")
            texts.append(f"{100 * cell['half_width']:.1f}")
            lines.append(f"| {dominant} | {', '.join(map(str, design))} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def summary(cells: dict[str, dict]) -> str:
    """Markdown for the page: the worst over sizes of the test, a line a number of splits and seeds."""
    lines = []
    for world, (_, _, sizes) in WORLDS.items():
        if not any(name.startswith(f"{world};") for name in cells):
            lines += ["", f"**{world.capitalize()}**: not run yet."]
            continue
        of = " and ".join(f"{size:,}" for size in sizes)
        lines += ["", f"**{world.capitalize()}**, tests of {of}:", "", f"| splits, seeds | {' | '.join(DOMINANT)} |"]
        lines.append("|" + "---|" * (1 + len(DOMINANT)))
        for splits, seeds in itertools.product(SPLITS, SEEDS):
            texts = []
            for dominant in DOMINANT:
                found = [cells.get(key(world, dominant, (splits, seeds, size))) for size in sizes]
                known = [cell for cell in found if cell]
                if not known:
                    texts.append("not run")
                    continue
                single, old_single = (100 * min(cell[name] for cell in known) for name in ("single", "old_single"))
                false, old_false = (100 * max(cell[name] for cell in known) for name in ("false", "old_false"))
                claims = f"{false:.1f}" if claimable(splits, seeds) else "none"
                texts.append(f"{single:.1f} ({old_single:.0f}); {claims} ({old_false:.0f})")
            lines.append(f"| {splits}, {seeds} | {' | '.join(texts)} |")
    return "\n".join(lines)


def claimable(splits: int, seeds: int) -> bool:
    """Whether `compare` claims anything."""
    return (splits if splits > 1 else seeds) >= MIN_UNITS


def key(world: str, dominant: str, design: tuple[int, ...]) -> str:
    """Of a cell in coverage.json."""
    return f"{world}; {dominant}; {', '.join(map(str, design))}"


def main() -> None:
    """Measure every cell that is not there yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500, help="comparisons a cell")
    parser.add_argument("--table", action="store_true", help="write the tables of what is there")
    parser.add_argument("--old-repeats", type=int, default=60, help="of these, by the old method too")
    arguments = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    path = HERE / "coverage.json"
    cells = json.loads(path.read_text()) if path.exists() else {}
    todo = [] if arguments.table else itertools.product(WORLDS, TESTS, DOMINANT)
    for name, size, dominant in todo:
        gaps, uneven, sizes = WORLDS[name]
        world = World(dominant, gaps, uneven)
        for design in itertools.product(SPLITS, SEEDS, [size] if size in sizes else []):
            if key(name, dominant, design) not in cells:
                start = time.perf_counter()
                cells[key(name, dominant, design)] = measure(world, design, arguments.repeats, arguments.old_repeats)
                print(key(name, dominant, design), f"{time.perf_counter() - start:.0f} s", flush=True)
                path.write_text(json.dumps(cells, indent=1) + "\n")
    (HERE / "coverage.md").write_text(table(cells))
    marks = r"(<!-- table -->\n).*?(<!-- end -->)"
    text = re.sub(marks, lambda found: f"{found[1]}{summary(cells)}\n\n{found[2]}", PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
