"""What a comparison tries: the heads, and hyper-parameters drawn for each trial.

Trial k is a function of the settings and k, whatever else runs. The points of all trials are those of an additive
recurrence (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018) behind a random shift: each is
uniform by itself, and together they leave smaller gaps than independent draws, which counts with 16 of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from pspinal_jax.errors import UsageError

HeadName = Literal["progressive", "spinal", "mlp", "dense"]
HEADS: tuple[HeadName, ...] = get_args(HeadName)
Match = Literal["published", "parameters"]
Mode = Literal["auto", "loop", "vmap"]
Metric = Literal["accuracy", "macro_f1", "balanced_accuracy", "log_likelihood", "calibration_error"]
Range = tuple[float, float]
Scaling = Literal["each", "all", "none"]
"""How features are standardised: each by its own mean and deviation, all by one of each, or not at all."""


class Hparams(NamedTuple):
    """The hyper-parameters of one training, each a number or a float32 scalar array."""

    learning_rate: float
    weight_decay: float
    dropout_rate: float
    label_smoothing: float


class Trial(NamedTuple):
    """All that is drawn for a training: numbers, and how the features are standardised."""

    hparams: Hparams
    standardize: Scaling

    def as_json(self) -> dict[str, Any]:
        """As it stands in the files."""
        return {**self.hparams._asdict(), "standardize": self.standardize}


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What is compared, and how."""

    heads: tuple[HeadName, ...] = HEADS
    """The heads."""
    floors: bool = True
    """Also the baselines, their settings chosen on validation: logistic regression (45 values of C), linear
    discriminants, the nearest class mean, k nearest neighbours and ridge regression."""
    trials: int = 16
    """Settings tried of every head: trial K is a function of (seed, K) and the ranges below alone."""
    num_seeds: int = 5
    """Trainings of the setting that did best on validation: other initialisation, order, masks and validation part."""
    refit: bool = True
    """Then train that setting on training and validation examples together, as many times, and look at the test with
    these. Without, the test sees the trainings before."""
    save: bool = True
    """Leave the best head or linear baseline as a run in WORKDIR/best, for predict, evaluate, report and export."""
    splits: int = 1
    """1: the data's own test split. K: K splits, of which the first is the data's own; the others draw test examples
    anew, as many of each class. Each is tuned by itself."""
    seed: int = 0
    """Decides trials, trainings and splits."""
    match: Match = "published"
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
    metric: Metric = "accuracy"
    """What methods are compared by on the test, beside accuracy; the last two after a temperature on validation.
    Validation accuracy chooses all the same, so that another metric of a finished comparison trains nothing."""
    learning_rate: Range = (1e-4, 1e-2)
    """Lowest and highest peak learning rate; log-uniform, as the others. Both alike: one value."""
    weight_decay: Range = (1e-2, 3.0)
    """Of AdamW, of kernels."""
    dropout_rate: Range = (0.02, 0.6)
    """The head's; for its meaning see `train`."""
    label_smoothing: Range = (0.1, 0.1)
    """Not tuned by default."""
    mode: Mode = "auto"
    """loop: trainings on a core each; vmap: many as one program, over all devices. auto: loop on CPU."""
    workers: int | None = None
    """loop: trainings at a time; by default the cores of this process."""

    def __post_init__(self) -> None:
        for name in ("trials", "num_seeds", "splits", "layer_width", "num_layers", "batch_size", "epochs", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected at least 1")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"seed is {self.seed}, expected 0 .. 2**31 - 1")
        if not 0 < self.validation_fraction < 1:
            raise UsageError(f"validation_fraction is {self.validation_fraction:g}, expected 0 < FRACTION < 1")
        if not self.heads or not set(self.heads) <= set(HEADS) or len(set(self.heads)) < len(self.heads):
            raise UsageError(f"heads are {' '.join(self.heads)}, expected some of {' '.join(HEADS)}, each once")
        for name, (low, high) in self.ranges.items():
            limit = 1.0 if name in ("dropout_rate", "label_smoothing") else 1e6
            never = low == high == 0.0 and name != "learning_rate"
            if not never and not 0.0 < low <= high < limit:
                raise UsageError(f"{name} is {low:g} .. {high:g}, expected 0 < LOW <= HIGH < {limit:g}")

    @property
    def ranges(self) -> dict[str, Range]:
        """Lowest and highest value of each hyper-parameter; in between, their logarithms are uniform."""
        return {name: getattr(self, name) for name in Hparams._fields}


_DIMENSIONS = len(Hparams._fields) + 1


def draw_trial(config: CompareConfig, trial: int, scalings: Sequence[Scaling]) -> Trial:
    """Trial `trial`, counted from 0; each of `scalings` is as likely."""
    shift = np.random.default_rng([config.seed, 18]).random(_DIMENSIONS)
    point = (shift + trial * _steps()) % 1.0
    values = []
    for (low, high), position in zip(config.ranges.values(), point, strict=False):
        value = low if low == high else float(np.exp(np.log(low) + position * np.log(high / low)))
        values.append(float(f"{min(max(value, low), high):.6g}"))  # as the table shows it, so that it can be typed in
    return Trial(Hparams(*values), scalings[int(point[-1] * len(scalings))])


def _steps() -> np.ndarray:
    """Powers of 1 / g, where g > 1 solves g**(d + 1) = g + 1; for d = 1 the golden ratio."""
    g = 2.0
    for _ in range(64):
        g = (1.0 + g) ** (1.0 / (_DIMENSIONS + 1))
    return g ** -np.arange(1.0, _DIMENSIONS + 1)


def training_seed(seed: int, kind: str, number: int) -> int:
    """Seed 0 .. 2**31 - 1 of all random numbers of a training: trial `number`, or final training `number`."""
    words = np.random.SeedSequence([seed, {"trial": 1, "seed": 2, "refit": 3}[kind], number]).generate_state(1)
    return int(words[0] >> 1)
