"""What a recipe is made of: frozen dataclasses, whose fields are the command line's flags."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pspinal_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Card:
    """What a recipe is, as opposed to how it trains; not settable on the command line."""

    name: str
    """The name that `train` takes."""
    row: str
    """The row of the paper's table, or 'none'."""
    model: str
    """The model in a few words."""
    published_accuracy: float | None = None
    """The paper's test accuracy in percent."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the examples come from and how they are split."""

    name: str
    """TFDS name of the data set."""
    path: Path | None = None
    """Read this instead: an .npz file with train_images (or 2-D float features), train_labels, test_images and
    test_labels, or the directory of a data set that TFDS prepared as array_record."""
    data_dir: Path | None = None
    """TFDS data folder; by default TFDS's own (TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    num_classes: int | None = None
    """Number of classes C, labels 0 .. C-1; by default what the data says."""
    mean: float = 0.0
    """Subtracted from images scaled to 0 .. 1."""
    std: float = 1.0
    """What images are divided by after that."""
    num_validation: int = 0
    """Examples held out of train to select the epoch by; 0 trains on all and takes the last epoch."""
    split_seed: int = 0
    """Seed of the choice of those examples, the same for every training seed."""
    augment: Literal["none", "perspective_rotation"] = "none"
    """perspective_rotation: in training, the published random perspective (p 0.5) and rotation (up to 10 degrees)."""
    transposed: bool = False
    """Swap rows and columns of every image: EMNIST as it is stored, and as the published scripts saw it."""
    drop_remainder: bool = True
    """Leave out the last, smaller training batch of an epoch (other examples each epoch)."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Backbone and head."""

    backbone: Literal["none", "vgg5"] = "none"
    """'none': the head sees the pixels or features as they are; 'vgg5': 28x28 grey images to 256 features."""
    head: Literal["progressive", "spinal", "mlp", "dense"] = "progressive"
    """'mlp' gets the width at which it has as many parameters as the progressive head would have."""
    layer_width: int = 128
    """Width of each hidden layer."""
    num_layers: int = 4
    """Number of hidden layers."""
    dropout_rate: float = 0.2
    """Progressive: of the features, one mask for layers 2 .. L and the output. Others: of every layer's input."""
    layer_dropout_rate: float = 0.0
    """Of the whole input of every layer; progressive head only."""
    norm: Literal["none", "batch"] = "none"
    """Batch norm in every hidden layer."""
    implementation: Literal["auto", "unrolled", "fused", "scan"] = "auto"
    """How the progressive head is computed; the results are the same up to rounding."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimiser."""
    learning_rate: float = 0.05
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd, first-moment decay of adam and adamw."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of kernels (adamw)."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """cosine: down to 0 over the run; one_cycle: linear warm-up over `warmup_fraction`, then cosine to 0."""
    warmup_fraction: float = 0.3
    """Share of the steps that one_cycle warms up for."""
    steering: Literal["none", "best_on_test"] = "none"
    """best_on_test: as the published VGG-5 scripts, an epoch that does not beat the best TEST accuracy so far draws a
    new learning rate, the scheduled one times U(0,1)^3, kept until the next such draw; paper's protocol only."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a run's result; two runs with equal recipes and data are equal."""

    card: Annotated[Card, tyro.conf.Suppress]
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: int = 10
    """Passes over the training data."""
    batch_size: int = 64
    """Examples per step, over all devices."""
    eval_batch_size: int = 1000
    """Examples per evaluation step; the last batch is padded and masked."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    seed: int = 0
    """First seed; with num_seeds K the seeds are seed .. seed + K - 1."""
    num_seeds: int = 1
    """Number of seeds to train; the result is their mean and standard deviation."""
    seed_mode: Literal["auto", "loop", "vmap"] = "auto"
    """Train the seeds one after the other, or as one vectorised program; auto: loop on CPU, vmap elsewhere."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype to compute in; parameters stay float32."""
    protocol: Literal["validation", "paper"] = "validation"
    """validation: the epoch is selected on held-out training data and the test split is evaluated once.
    paper: trains on all training data and evaluates the test split every epoch; last and best are both reported."""
    rounds: int = 1
    """paper's protocol: trainings of `epochs` one after the other, each from the parameters that were best on test in
    the one before, with a fresh optimiser (QMNIST's chain)."""
    retrain: bool = False
    """validation protocol: train again on train + validation, for the selected number of epochs, before the test."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size", "num_seeds"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "0 .. 2**31 - 1")
        _require(0.0 <= self.label_smoothing < 1.0, "label_smoothing", self.label_smoothing, "in [0, 1)")
        _require(self.data.num_validation >= 0, "data.num_validation", self.data.num_validation, "at least 0")
        _require(self.data.std > 0, "data.std", self.data.std, "above 0")
        classes = self.data.num_classes
        _require(classes is None or classes >= 2, "data.num_classes", classes, "at least 2")
        for name in ("layer_width", "num_layers"):
            _require(getattr(self.model, name) >= 1, f"model.{name}", getattr(self.model, name), "at least 1")
        for name in ("dropout_rate", "layer_dropout_rate"):
            rate = getattr(self.model, name)
            _require(0.0 <= rate < 1.0, f"model.{name}", rate, "in [0, 1)")
        optimizer = self.optimizer
        rate = optimizer.learning_rate
        _require(rate > 0 and math.isfinite(rate), "optimizer.learning_rate", rate, "above 0")
        _require(0.0 <= optimizer.momentum < 1.0, "optimizer.momentum", optimizer.momentum, "in [0, 1)")
        _require(optimizer.weight_decay >= 0.0, "optimizer.weight_decay", optimizer.weight_decay, "at least 0")
        fraction = optimizer.warmup_fraction
        _require(0.0 <= fraction < 1.0, "optimizer.warmup_fraction", fraction, "in [0, 1)")
        paper = self.protocol == "paper"
        _require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        _require(self.rounds == 1 or paper, "rounds", self.rounds, "1 unless --protocol paper")
        steered = optimizer.steering == "best_on_test"
        _require(not steered or paper, "optimizer.steering", optimizer.steering, "none unless --protocol paper")
        _require(
            not self.retrain or (self.protocol == "validation" and self.data.num_validation > 0),
            "retrain",
            self.retrain,
            "used with --protocol validation and --data.num-validation above 0",
        )


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}, expected {expected}")
