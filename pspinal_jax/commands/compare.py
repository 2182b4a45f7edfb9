"""`pspinal-jax compare DATA`: heads and baselines on this data, tuned alike, with intervals."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.comparison.settings import CompareConfig
from pspinal_jax.errors import UsageError, printable
from pspinal_jax.training.signals import leave_at_once


@dataclasses.dataclass(frozen=True)
class Source:
    """Data to compare on, and the folder for results."""

    data: Annotated[str, tyro.conf.Positional]
    """An .npz file of features or images (train_images, train_labels, test_images, test_labels), a table of features
    (.csv, .tsv, .parquet) with a column of labels, the directory or the name of a prepared data set, or a folder of
    images in class folders."""
    workdir: Path | None = None
    """Folder for trials.jsonl, compare.json, compare.md, compare.png and best (the best model), by default
    runs/compare-NAME. Repeating the command resumes a comparison; finished trials are not run again."""
    backbone: str | None = None
    """Folder of images: backbone that computes the features, efficientnet_lite0, 1 or 2; by default that of `train
    folder`."""
    weights: str | None = None
    """The backbone's weights, as --model.weights of `train`, or 'random'; by default those of `train folder`."""


@dataclasses.dataclass(frozen=True)
class CompareArguments(CompareConfig, Source):
    """Compare heads, logistic regression and other baselines on the same data with the same tuning budget. Each head
    tries TRIALS settings; the best on validation is trained with NUM_SEEDS seeds and evaluated once on the test split.
    The best model is kept.
    """


def compare(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    if not args:
        raise UsageError(
            "compare takes data: an .npz file, a table, a prepared data set or a folder of images; see --help"
        )
    parsed = parse(CompareArguments, args, "compare", "features.npz")
    command = f"pspinal-jax compare {shlex.join(args)}"
    with leave_at_once(f"finished trials are kept. Resume with: {command}"):
        from pspinal_jax.comparison.api import compare_data, load_features
        from pspinal_jax.comparison.trial_log import TrialLog

        workdir = parsed.workdir or Path("runs") / f"compare-{Path(parsed.data).stem or 'data'}"
        log = TrialLog(workdir)
        source = load_features(parsed.data, log, parsed.backbone, parsed.weights, parsed.seed)
        comparison = compare_data(source, parsed, log, command)
    print(comparison)
    print(f"results in {printable(workdir)}: compare.json, compare.md, compare.png, trials.jsonl")
    if (best := comparison.result["execution"]["best_model"]) is not None:
        print(f"{comparison.result['saved']} as a run: pspinal-jax predict {shlex.quote(printable(best))} ..")
    return 0
