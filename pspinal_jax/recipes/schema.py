"""What a recipe is made of: frozen dataclasses, whose fields are the command line's flags, with their constraints."""

import dataclasses
import math
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pspinal_jax.errors import UsageError

try:
    from tyro.conf import Suppress
except ImportError:  # recipes can be used, and benchmarks run, where the command line's parser is not installed
    Suppress = None  # type: ignore[misc]


TABLES = (".csv", ".tsv", ".parquet")
"""Endings of files that are read as tables."""
OWN: Final = "own"
"""`DataConfig.image_size` that stands for the backbone's default."""

_NO_WEIGHTS = ("none", "null", "random", "scratch", "imagenet", "default", "true", "false", "yes", "no", "")
"""Weights that people write, but that are neither a file nor a name on a hub; only None means no weights."""
_FLOAT32_MAX = 3.4e38


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may hold; a tuple has them all in it, and None is allowed where the type has it."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.at_least <= number <= self.at_most and self.above < number < self.below

    def __str__(self) -> str:
        bounds = {name.replace("_", " "): bound for name, bound in vars(self).items() if math.isfinite(bound)}
        return " and ".join(f"{name} {bound}" for name, bound in bounds.items())


_COUNT, _NOT_NEGATIVE, _FRACTION = Range(1), Range(0), Range(0, below=1)
_FINITE = Range(0, below=_FLOAT32_MAX)
_POSITIVE = Range(above=0, below=_FLOAT32_MAX)


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise UsageError for the first field, of the dataclass `config` or one in it, outside its `Range`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{field.name}.")
        numbers = value if isinstance(value, tuple) else (value,)
        for limits in getattr(field.type, "__metadata__", ()):
            if isinstance(limits, Range) and any(each is not None and each not in limits for each in numbers):
                raise UsageError(f"{prefix}{field.name} is {value}, expected {limits}")


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
    """Read this instead: an .npz file with train_images (or 2-D features), train_labels, test_images and test_labels, a
    table of features and labels (.csv, .tsv or .parquet, read by pandas), the directory of a data set that TFDS
    prepared as array_record or, for image files, a folder of class folders (or of train, valid and test folders that
    hold class folders)."""
    data_dir: Path | None = None
    """TFDS data folder; by default TFDS's own (TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    num_classes: Annotated[int | None, Range(2)] = None
    """Number of classes C, labels 0 .. C-1; by default what the data says."""
    mean: Annotated[float | tuple[float, float, float] | None, Range(above=-_FLOAT32_MAX, below=_FLOAT32_MAX)] = None
    """Subtracted from images scaled to 0 .. 1; one number, or one a channel; by default the backbone's own, 0 without
    one."""
    std: Annotated[float | tuple[float, float, float] | None, Range(above=1 / _FLOAT32_MAX, below=_FLOAT32_MAX)] = None
    """What images are divided by after that; by default the backbone's own, 1 without one."""
    num_validation: Annotated[int, _NOT_NEGATIVE] = 0
    """Arrays: examples held out of train to select the epoch by, where the data has no validation split of its own and
    the protocol is not paper; 0 trains on all and takes the last epoch."""
    image_size: int | Literal["own"] | None = None
    """Image files: side in pixels of the square images that the model sees; own for the backbone's. They are read while
    training. None for data that is held in memory."""
    resize: int | None = None
    """Image files: side that training images are resized to before they are cropped to image_size; by default
    230 / 224 of it for rotation_crop_flip, 256 / 224 for resized_crop_flip. Evaluation resizes to image_size."""
    fit: Literal["squash", "crop", "pad"] = "squash"
    """Image files: how an image that is no square becomes one, everywhere. squash: without keeping the aspect, as the
    paper; crop: the middle square, in training another one each epoch where --data.augment crops; pad: whole, between
    black bars."""
    validation_fraction: Annotated[float, _FRACTION] = 0.0
    """Image files: fraction of each class held out of train to select the epoch by, where the data has no validation
    split of its own and the protocol is not paper."""
    test_fraction: Annotated[float, Range(above=0, below=1)] = 0.2
    """Tables, and image files in class folders without a test folder: fraction of each class that is the test split."""
    strict: bool = False
    """Image files: refuse a folder with unreadable images; otherwise they are named and left out."""
    labels: Path | None = None
    """Image files: a table (.csv, .tsv) that says what they show, in place of class folders: the columns path (in the
    folder `path`, by default the table's own) and label, and perhaps split (train, validation, test) and group. One
    label an image."""
    group: str | None = None
    """Image files: what must lie on one side where a split is cut. A regular expression: images whose path, in the
    data's folder, has the same match (its first group, if it has one); near: images that look alike. A column group of
    the table does so by itself."""
    split_seed: Annotated[int, _NOT_NEGATIVE] = 0
    """Seed of the choice of those examples, the same for every training seed."""
    keep_copies_together: Annotated[bool, Suppress] = True
    """Draw examples of the same content to one side where splits are cut. No flag: runs of before it had drawn each by
    itself, and go on so."""
    augment: Literal["none", "perspective_rotation", "rotation_crop_flip", "resized_crop_flip"] = "none"
    """none: pictures as they are, but for augment.color_jitter, which is a setting of its own.
    perspective_rotation: in training, the published random perspective (p 0.5) and rotation (up to 10 degrees).
    rotation_crop_flip: image files; rotation (up to 15 degrees), random crop to image_size, flip (p 0.5).
    resized_crop_flip: image files; a crop of random area (from augment.min_area) and aspect, resized; flip (p 0.5)."""
    transposed: bool = False
    """Swap rows and columns of every image: EMNIST as it is stored, and as the published scripts saw it."""
    drop_remainder: bool = True
    """Leave out the last, smaller training batch of an epoch (other examples each epoch)."""
    shuffle: bool = True
    """Visit the training examples in another order every epoch; the published STL-10 script does not."""

    @property
    def is_table(self) -> bool:
        """Whether `path` is a table, from which a test split is cut."""
        return self.image_size is None and self.path is not None and self.path.suffix.lower() in TABLES

    @property
    def side(self) -> int:
        """Image files: `image_size` in pixels; 0 for data that is held in memory.

        Raises:
          ValueError: if it is the backbone's own, which `models.with_default_preprocessing` fills in.
        """
        if self.image_size == OWN:
            raise ValueError("data.image_size is the backbone's own; call with_default_preprocessing first")
        return self.image_size or 0

    @property
    def train_side(self) -> int:
        """Image files: side in pixels that training images are decoded to."""
        size = self.side
        if self.resize is not None:
            return self.resize
        return round(size * {"rotation_crop_flip": 230, "resized_crop_flip": 256}.get(self.augment, 224) / 224)

    @property
    def crops(self) -> bool:
        """Image files: whether training images are cropped to image_size on the device."""
        return self.augment in ("rotation_crop_flip", "resized_crop_flip")


BackboneName = Literal[
    "none", "vgg5", "resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "wide_resnet101_2",
    "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Backbone and head."""

    backbone: BackboneName = "none"
    """'none': the head sees the pixels or features as they are; 'vgg5': 28x28 grey images to 256 features; the others:
    colour images of any size to 512 (resnet18, resnet34), 1280 (efficientnet_lite) or 2048 features."""
    weights: str | None = None
    """Start the backbone from these weights: a .safetensors or .pt file, 'hf:OWNER/NAME' on the Hugging Face hub, or
    'pretrained' for ImageNet weights of the backbone: an EfficientNet's of its pip package where that is installed
    (extra `efficientnet`), otherwise the hub's."""
    remat: bool = False
    """Compute the backbone's blocks again in the backward pass in place of keeping their activations."""
    head: Literal["progressive", "spinal", "mlp", "dense"] = "progressive"
    """'mlp' gets the width at which it has as many parameters as the progressive head would have; 'dense' is the output
    layer alone, without hidden layers for layer_width, num_layers and norm to describe."""
    layer_width: Annotated[int, Range(1, 2**20)] = 128
    """Width of each hidden layer."""
    num_layers: Annotated[int, Range(1, 1000)] = 4
    """Number of hidden layers."""
    dropout_rate: Annotated[float, _FRACTION] = 0.2
    """Progressive: of the features, one mask for layers 2 .. L and the output. Others: of every layer's input."""
    layer_dropout_rate: Annotated[float, _FRACTION] = 0.0
    """Of the whole input of every layer; progressive head only."""
    norm: Literal["none", "batch"] = "none"
    """Batch norm in every hidden layer."""
    implementation: Literal["auto", "unrolled", "fused", "scan"] = "auto"
    """How the progressive head is computed; the results are the same up to rounding."""

    @property
    def is_resnet(self) -> bool:
        """Whether the backbone is a ResNet."""
        return self.backbone.removeprefix("wide_").startswith("resnet")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimiser."""
    learning_rate: Annotated[float, _POSITIVE] = 0.05
    """Peak learning rate."""
    momentum: Annotated[float, _FRACTION] = 0.9
    """Momentum of sgd, first-moment decay of adam and adamw."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    weight_decay: Annotated[float, _FINITE] = 0.0
    """Decoupled weight decay of kernels (adamw)."""
    schedule: Literal["constant", "cosine", "one_cycle", "step"] = "constant"
    """cosine: down to 0 over the run; one_cycle: linear warm-up over `warmup_fraction`, then cosine to 0; step: times
    0.1 every `decay_epochs` epochs."""
    decay_epochs: Annotated[int, _COUNT] = 7
    """Epochs between two decays of the schedule `step`."""
    warmup_fraction: Annotated[float, _FRACTION] = 0.3
    """Fraction of the steps that one_cycle warms up for."""
    warmup_epochs: Annotated[float, _NOT_NEGATIVE] = 0.0
    """constant, cosine and step: epochs, or a part of one, in which the learning rate first rises linearly, from 1 / 25
    of its peak; the schedule takes the rest of the run."""
    backbone_rate: Annotated[float, _POSITIVE] = 1.0
    """What the learning rate is multiplied with for the backbone's parameters; the head's stays."""
    steering: Literal["none", "best_on_test"] = "none"
    """best_on_test: as the published VGG-5 scripts, an epoch that does not beat the best TEST accuracy so far draws a
    new learning rate, the scheduled one times U(0,1)^3, until the next such draw; paper's protocol only."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Mixing of examples, and strengths; everything here is off, or without effect, by default."""

    mixup: Annotated[float, Range(0, 100)] = 0.0
    """Alpha of mixup: every training batch is blended with itself in another order, by a weight drawn from Beta(alpha,
    alpha); 0 for none. Images and features."""
    cutmix: Annotated[float, Range(0, 100)] = 0.0
    """Alpha of cutmix: a box of every training image comes from another one, of an area drawn from Beta(alpha, alpha);
    0 for none. With mixup too, each batch takes one of the two at random."""
    color_jitter: Annotated[float, Range(0, 1)] = 0.0
    """Brightness, contrast and saturation of every training image are multiplied by numbers from 1 - this to 1 + this;
    0 for none. Colour or grey images."""
    min_area: Annotated[float, Range(above=0, at_most=1)] = 0.25
    """resized_crop_flip: the smallest part of the image's area that a crop may have; the largest is 1."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run is spread over devices.

    It decides where numbers lie and not what they are (up to rounding), so a run may go on on another mesh.
    """

    data: int = -1
    """Devices, or groups of them, over which a batch is sharded and parameters are not; -1: as many as are left."""
    fsdp: Annotated[int, _COUNT] = 1
    """Devices over which a batch, the parameters and the optimiser's state are sharded."""
    model: Annotated[int, _COUNT] = 1
    """Devices over which the output layer of the head is sharded, by class; a divisor of the number of classes."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a run's result, and `mesh`; two runs with equal recipes and data are equal."""

    card: Annotated[Card, Suppress]
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    epochs: Annotated[int, _COUNT] = 10
    """Passes over the training data."""
    patience: Annotated[int, _NOT_NEGATIVE] = 0
    """Stop after so many epochs without a better validation accuracy, of every seed; 0 for never."""
    batch_size: Annotated[int, _COUNT] = 64
    """Examples per step, over all devices."""
    eval_batch_size: Annotated[int, _COUNT] = 1000
    """Examples per evaluation step; the last batch is padded and masked."""
    micro_batches: Annotated[int, _COUNT] = 1
    """Parts that a step's batch is split into, one after the other, to save memory; batch norm sees each by itself."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Where the loss, a gradient or a running statistic is not finite, stop the run and name the step, or leave that
    step out and go on."""
    freeze: Literal["none", "backbone"] = "none"
    """backbone: its parameters and running statistics stay as they are, and the head alone is trained."""
    cache_features: bool = False
    """With a frozen backbone: run it over the data once, then train the head on the features, which lie on the device.
    Nothing is augmented then, but see feature_views. The head of a shipped recipe is then a linear layer, trained as in
    the recipe `linear` or, where a flag asks for hidden layers, as in `features`: optimiser, epochs, batch size and
    label smoothing come from there, and nothing is held out, unless flags say so."""
    feature_views: Annotated[int, _NOT_NEGATIVE] = 0
    """With cache_features: augmented passes over the training data, whose features are all trained on; 0 for one pass
    without augmentation."""
    label_smoothing: Annotated[float, _FRACTION] = 0.0
    """Fraction of the target spread evenly over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: in training, the loss of an example of class c counts N / (K n_c) times: N training examples, n_c of
    them of class c, K classes. The evaluated loss stays unweighted; the epoch is selected by balanced accuracy."""
    sampler: Literal["none", "balanced"] = "none"
    """balanced: an epoch draws as many examples of every class, those of small classes several times and of large ones
    not all; it has as many steps as before. The epoch is selected by balanced accuracy."""
    gradient_clip: Annotated[float, _FINITE] = 0.0
    """Largest L2 norm of the gradient of all parameters together; longer ones are scaled down to it. 0 for no limit."""
    ema_decay: Annotated[float, _FRACTION] = 0.0
    """Decay of an exponential moving average of the parameters and running statistics, which is then evaluated,
    selected and kept; 0.99 to 0.9999 are usual. 0 for none."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """First seed; with num_seeds K the seeds are seed .. seed + K - 1."""
    num_seeds: Annotated[int, Range(1, 2**16)] = 1
    """Number of seeds to train; the result is their mean and standard deviation."""
    seed_mode: Literal["auto", "loop", "vmap", "processes"] = "auto"
    """Train the seeds one after the other (loop), as one vectorised program (vmap), or in parallel with one process per
    core of the CPU (processes). auto: vmap on GPU and TPU; on CPU processes for a long training of a head alone, else
    loop."""
    batch_norm: Literal["global", "per_device"] = "global"
    """What batch norm sees in training on several devices: the whole batch, or each device its own part; then the
    result depends on the number of devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype to compute in; parameters stay float32."""
    protocol: Literal["validation", "paper"] = "validation"
    """validation: the epoch is selected on held-out training data and the test split is evaluated once.
    paper: trains on all training data and evaluates the test split every epoch; last and best are both reported."""
    rounds: Annotated[int, _COUNT] = 1
    """paper's protocol: trainings of `epochs` one after the other, each from the parameters that were best on test in
    the one before, with a fresh optimiser (QMNIST's chain)."""
    retrain: bool = False
    """validation protocol: train again on train + validation, for the selected number of epochs, before the test."""
    mesh: MeshConfig = MeshConfig()
    """How the run is spread over devices."""

    @property
    def refuses_batches_of_one(self) -> bool:
        """Whether a batch norm of the model sees one position of each example, and so refuses a batch of one."""
        in_backbone = self.model.is_resnet and self.data.image_size == 32 and self.freeze == "none"
        return in_backbone or (self.model.norm == "batch" and self.model.head != "dense")

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, holds, expected in self._combinations():
            if not holds:
                raise UsageError(f"{name} is {operator.attrgetter(name)(self)}, expected {expected}")

    def _combinations(self) -> Iterator[tuple[str, bool, str]]:
        """(field, whether it goes with the others, what is expected of it)."""
        data, model, optimizer, mesh = self.data, self.model, self.optimizer, self.mesh
        size = 8 if data.image_size == OWN else data.image_size  # the backbone's default is filled in later
        images, paper, balanced = size is not None, self.protocol == "paper", self.sampler == "balanced"
        yield "data.image_size", size is None or 8 <= size <= 4096, "8 .. 4096, or own"
        yield "data.augment", images or not data.crops, "one that does not crop, without data.image_size"
        if data.resize is not None:
            yield "data.resize", size is not None and size <= data.resize <= 8192, "image_size .. 8192"
            crops = "data.augment=rotation_crop_flip or resized_crop_flip, which crop to image_size"
            yield "data.resize", data.resize == data.image_size or data.crops, f"None unless {crops}"
        yield "freeze", self.freeze == "none" or model.backbone != "none", "none where there is no backbone"
        weights = "None, written so, for random numbers, or pretrained for ImageNet weights"
        yield "model.weights", model.weights is None or model.weights.lower() not in _NO_WEIGHTS, weights
        published = model.weights is None or model.backbone not in ("none", "vgg5")
        yield "model.weights", published, "None unless with a ResNet or EfficientNet backbone"
        yield "optimizer.warmup_epochs", optimizer.warmup_epochs < self.epochs, "fewer than epochs"
        yield "optimizer.steering", optimizer.steering == "none" or paper, "none unless protocol=paper"
        yield "mesh.data", mesh.data == -1 or mesh.data >= 1, "at least 1, or -1"
        for name in ("fsdp", "model"):
            alone = getattr(mesh, name) == 1 or self.batch_norm == "global"
            yield f"mesh.{name}", alone, "1 with batch_norm=per_device, whose devices hold all parameters"
        yield "micro_batches", self.batch_size % self.micro_batches == 0, "a divisor of batch_size"
        of_one = self.batch_norm == "global" and self.batch_size == self.micro_batches  # run_mesh checks per_device
        yield "batch_size", not of_one or not self.refuses_batches_of_one, "2 or more a micro-batch for batch norm"
        loops = self.seed_mode in ("auto", "loop") or not images
        yield "seed_mode", loops, "loop or auto for image files, which every seed reads in its own order"
        cached = not self.cache_features or (self.freeze == "backbone" and images)
        yield "cache_features", cached, "False unless freeze=backbone, on image files"
        yield "feature_views", self.feature_views == 0 or self.cache_features, "0 without cache_features"
        yield "class_weights", self.class_weights == "none" or not balanced, "none with sampler=balanced"
        yield "sampler", data.shuffle or not balanced, "none without data.shuffle"
        yield "rounds", self.rounds == 1 or paper, "1 unless protocol=paper"
        yield "ema_decay", self.ema_decay == 0.0 or not paper, "0 with protocol=paper"
        yield "patience", self.patience == 0 or not paper, "0 with protocol=paper"
        yield "retrain", not self.retrain or not paper, "False with protocol=paper"


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of `train` that are no part of the recipe."""

    workdir: Path | None = None
    """Run directory, runs/RECIPE by default; an unfinished run in it is resumed."""
    init_from: Path | None = None
    """Start from the selected parameters and running statistics of this run directory; where its classes are others,
    the output layer starts anew."""
    checkpoint_seconds: float = 1.0
    """Least time between two checkpoints; the first epoch and the end are always saved."""
    workers: int = 0
    """Processes that decode image files; 0 for threads of this one, which on few cores is as fast."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""
    profile: Path | None = None
    """Write a trace of a few steps, after the first ones, into this folder; XProf and ui.perfetto.dev open it."""
    dump_hlo: Path | None = None
    """Write the compiled programs of training and evaluation into this folder, as text."""


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """How a run's processes find each other.

    Address, number and id are given together, or JAX finds them in the cluster's environment.
    """

    distributed: bool = False
    """Run as one of several processes, on one or more machines; every process is started with the same command."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, reachable from all. Without it JAX asks SLURM, Open MPI, Kubernetes or Cloud TPU."""
    num_processes: Annotated[int | None, _COUNT] = None
    """How many processes there are."""
    process_id: int | None = None
    """This process's number, from 0."""
    initialization_timeout: Annotated[int, _COUNT] = 120
    """Seconds to wait at the start until all processes are there."""
    heartbeat_timeout: Annotated[int, _COUNT] = 30
    """Seconds without a sign of life after which a process counts as dead, and the others end."""

    def __post_init__(self) -> None:
        check_ranges(self)
