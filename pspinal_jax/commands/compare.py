"""`pspinal-jax compare DATA`: which head for this data, tuned alike, and by more than the noise?"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.errors import UsageError, printable
from pspinal_jax.training.signals import leave_at_once


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Heads on the same data with the same tuning budget: TRIALS settings each, the best on validation trained with
    NUM_SEEDS seeds, one look at the test split; beside k nearest neighbours and ridge regression.
    """

    data: Annotated[str, tyro.conf.Positional]
    """An .npz file of features or images (train_images, train_labels, test_images, test_labels), a table of features
    (.csv, .tsv, .parquet) with a column of labels, the directory or the name of a prepared data set, or a folder of
    images in class folders."""
    workdir: Path | None = None
    """Where trials.jsonl, compare.json, compare.md and compare.png go; runs/compare-NAME by default. The same command
    goes on with what is there: finished trials are not run again."""
    heads: tuple[Literal["progressive", "spinal", "mlp", "dense"], ...] = ("progressive", "spinal", "mlp", "dense")
    """The heads."""
    floors: bool = True
    """Also k nearest neighbours and ridge regression in closed form, k and penalty chosen on validation."""
    trials: int = 16
    """Settings tried of every head: trial K is a function of (seed, K) and the ranges below alone."""
    num_seeds: int = 5
    """Trainings of the setting that did best on validation: other initialisation, order, masks and validation part."""
    splits: int = 1
    """1: the data's own test split. K: K splits, of which the first is the data's own; the others draw test examples
    anew, as many of each class. Each is tuned by itself."""
    seed: int = 0
    """Decides trials, trainings and splits."""
    match: Literal["published", "parameters"] = "published"
    """published: progressive and spinal have num_layers hidden layers of layer_width. parameters: spinal is as wide as
    makes it equal progressive in parameters. mlp always does so; dense has no hidden layer."""
    layer_width: int = 256
    """Width of each hidden layer."""
    num_layers: int = 4
    """Number of hidden layers."""
    epochs: int | None = None
    """Passes of a training, by AdamW with a one-cycle schedule to 0; by default 20, or as many as make 600 steps."""
    batch_size: int = 64
    """Examples per step."""
    validation_fraction: float = 0.2
    """Of each class of the training data, cut by the seed where there is no validation split."""
    standardize: Literal["auto", "each", "all", "none"] = "auto"
    """Features by the training part's mean and standard deviation: each by its own, all by one. auto: of every trial
    drawn like the rest, one of these two; pixels: all."""
    learning_rate: tuple[float, float] = (1e-4, 1e-2)
    """Lowest and highest peak learning rate; log-uniform, as the others. Both alike: one value."""
    weight_decay: tuple[float, float] = (1e-2, 3.0)
    """Of AdamW, of kernels."""
    dropout_rate: tuple[float, float] = (0.02, 0.6)
    """The head's; for its meaning see `train`."""
    label_smoothing: tuple[float, float] = (0.1, 0.1)
    """Not tuned by default."""
    mode: Literal["auto", "loop", "vmap"] = "auto"
    """loop: trainings on a core each; vmap: many as one program, over all devices. auto: loop on CPU."""
    workers: int | None = None
    """loop: trainings at a time; by default the cores of this process."""
    backbone: str | None = None
    """Folder of images: whose features, efficientnet_lite0, 1 or 2; by default that of `train folder`."""
    weights: str | None = None
    """Its weights, as --model.weights of `train` (random: 'random'); by default those of `train folder`."""


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    if not args:
        raise UsageError(
            "compare takes data: an .npz file, a table, a prepared data set or a folder of images; see --help"
        )
    parsed = parse(
        CompareArguments,
        args,
        prog="pspinal-jax compare",
        description=" ".join(str(CompareArguments.__doc__).split()),
        example="pspinal-jax compare features.npz",
    )
    command = f"pspinal-jax compare {shlex.join(args)}"
    with leave_at_once(f"finished trials are kept. Go on with: {command}"):
        from pspinal_jax.comparison.door import compare_data, make_config
        from pspinal_jax.comparison.ledger import check_workdir
        from pspinal_jax.comparison.sources import load_features

        settings = dataclasses.asdict(parsed)
        source, workdir, backbone, weights = (settings.pop(k) for k in ("data", "workdir", "backbone", "weights"))
        config = make_config(settings)
        workdir = workdir or Path("runs") / f"compare-{Path(source).stem or 'data'}"
        check_workdir(workdir)
        data = load_features(source, workdir, backbone, weights, config.seed)
        comparison = compare_data(data, config, workdir, command)
    print(comparison)
    print(f"results in {printable(workdir)}: compare.json, compare.md, compare.png, trials.jsonl")
    return 0
