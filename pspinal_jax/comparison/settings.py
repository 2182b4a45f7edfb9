"""The settings of a comparison, and the hyper-parameters drawn for each trial.

Trial k depends only on the settings and k. The trials are points of an additive recurrence with a random shift
(M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018). Each point is uniform, and together they
leave smaller gaps than independent draws, which matters with 16 of them.
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
Engine = Literal["threads", "ray"]
Metric = Literal["accuracy", "macro_f1", "balanced_accuracy", "log_likelihood", "calibration_error"]
Range = tuple[float, float]
Scaling = Literal["each", "all", "none"]
"""How features are standardised: each by its own mean and standard deviation, all by one of each, or not at all."""


class Hparams(NamedTuple):
    """The hyper-parameters of one training, each a number or a float32 scalar array."""

    learning_rate: float
    weight_decay: float
    dropout_rate: float
    label_smoothing: float


class Trial(NamedTuple):
    """The hyper-parameters drawn for a training, and how its features are standardised."""

    hparams: Hparams
    standardize: Scaling

    def as_json(self) -> dict[str, Any]:
        """The trial as it is written to files."""
        return {**self.hparams._asdict(), "standardize": self.standardize}


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The settings of a comparison."""

    heads: tuple[HeadName, ...] = HEADS
    """Heads to compare."""
    floors: bool = True
    """Also compare with baselines, whose settings are chosen on validation: logistic regression (45 values of C),
    linear discriminant analysis, nearest class mean, k nearest neighbours and ridge regression."""
    trials: int = 16
    """Number of settings that every head tries. Trial K depends only on (seed, K) and the ranges below."""
    num_seeds: int = 5
    """Number of trainings of the setting that is best on validation, each with its own initialisation, order, dropout
    masks and validation part."""
    refit: bool = True
    """Train the best setting again, as many times, on training and validation examples together, and evaluate these on
    the test split. Otherwise the trainings before are evaluated."""
    save: bool = True
    """Keep the best head or linear baseline as a run in WORKDIR/best, for predict, evaluate, report and export."""
    splits: int = 1
    """Number of splits. The first is the data's own; the others draw the same number of test examples of each class.
    Each split is tuned separately."""
    seed: int = 0
    """Seed of trials, trainings and splits."""
    match: Match = "published"
    """published: progressive and spinal have num_layers hidden layers of layer_width. parameters: spinal is widened to
    the number of parameters of progressive. mlp always has that number; dense has no hidden layer."""
    layer_width: int = 256
    """Width of each hidden layer."""
    num_layers: int = 4
    """Number of hidden layers."""
    epochs: int | None = None
    """Epochs of a training, by AdamW with a one-cycle schedule to 0; by default 20, or enough for 600 steps."""
    batch_size: int = 64
    """Examples per step."""
    validation_fraction: float = 0.2
    """Fraction of each class of the training data that is held out by the seed, if there is no validation split."""
    standardize: Literal["auto", "each", "all", "none"] = "auto"
    """Standardisation of features by the training part's mean and standard deviation. each: every feature by its own;
    all: all features by one. auto: one of these two, drawn for every trial; for pixels, all."""
    metric: Metric = "accuracy"
    """Score on the test split to compare by, besides accuracy; the last two use calibrated probabilities. Validation
    accuracy still chooses the settings, so another metric of a finished comparison trains nothing."""
    learning_rate: Range = (1e-4, 1e-2)
    """Range of the peak learning rate, drawn log-uniformly like the others. Equal numbers fix the value."""
    weight_decay: Range = (1e-2, 3.0)
    """Range of AdamW's weight decay of kernels."""
    dropout_rate: Range = (0.02, 0.6)
    """Range of the head's dropout rate; see `train` for its meaning."""
    label_smoothing: Range = (0.1, 0.1)
    """Range of label smoothing, by default one value."""
    mode: Mode = "auto"
    """loop: one training per core; vmap: many trainings as one program, on all devices. auto: loop on CPU."""
    workers: int | None = None
    """loop: number of trainings at a time; by default the number of this process's cores."""
    engine: Engine = "threads"
    """threads: train on this machine; ray: train on a Ray cluster, with one core per training, which is repeated on
    another worker if its worker is lost. The results are the same."""
    ray_address: str | None = None
    """ray: address of the cluster, HOST:PORT of its head or auto; by default RAY_ADDRESS, or else a new cluster on this
    machine."""

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
        if self.engine == "ray" and self.mode == "vmap":
            raise UsageError("mode is vmap, but engine ray gives each training a core; leave mode out")
        if self.ray_address is not None and self.engine != "ray":
            raise UsageError(f"ray_address is {self.ray_address}, but engine is {self.engine}; give engine ray with it")
        for name, (low, high) in self.ranges.items():
            limit = 1.0 if name in ("dropout_rate", "label_smoothing") else 1e6
            never = low == high == 0.0 and name != "learning_rate"
            if not never and not 0.0 < low <= high < limit:
                raise UsageError(f"{name} is {low:g} .. {high:g}, expected 0 < LOW <= HIGH < {limit:g}")

    @property
    def ranges(self) -> dict[str, Range]:
        """Lowest and highest value of each hyper-parameter. Values are drawn log-uniformly."""
        return {name: getattr(self, name) for name in Hparams._fields}


_DIMENSIONS = len(Hparams._fields) + 1


def draw_trial(config: CompareConfig, trial: int, scalings: Sequence[Scaling]) -> Trial:
    """Trial `trial`, counted from 0; `scalings` are equally likely."""
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
    """Seed, 0 .. 2**31 - 1, of all random numbers of trial or final training `number`."""
    words = np.random.SeedSequence([seed, {"trial": 1, "seed": 2, "refit": 3}[kind], number]).generate_state(1)
    return int(words[0] >> 1)
