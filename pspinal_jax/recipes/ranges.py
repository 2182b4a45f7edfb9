"""What each field of a recipe may be, and which go together."""

import operator
from typing import Any, Final

from pspinal_jax.errors import UsageError

OWN: Final = "own"
"""As `DataConfig.image_size`: the backbone's."""
_NO_WEIGHTS = ("none", "null", "random", "scratch", "imagenet", "default", "true", "false", "yes", "no", "")
"""What people write as weights that is no file and no name on a hub; the command line reads None as no weights."""
_LARGEST = 3.4e38  # of float32, in which all is computed


def check_ranges(recipe: Any) -> None:
    """Raise UsageError, naming the first field of the `Recipe` that is out of range or does not go with the others."""
    for name in ("epochs", "batch_size", "eval_batch_size", "num_seeds", "micro_batches", "rounds"):
        _require(recipe, getattr(recipe, name) >= 1, name, "at least 1")
    _require(recipe, recipe.num_seeds <= 2**16, "num_seeds", f"1 .. {2**16}")
    _require(recipe, 0 <= recipe.seed < 2**31, "seed", "0 .. 2**31 - 1")
    _require(recipe, 0.0 <= recipe.label_smoothing < 1.0, "label_smoothing", "in [0, 1)")
    _require(recipe, recipe.feature_views >= 0, "feature_views", "at least 0")
    _require(recipe, 0.0 <= recipe.gradient_clip < _LARGEST, "gradient_clip", "at least 0")
    _require(recipe, 0.0 <= recipe.ema_decay < 1.0, "ema_decay", "in [0, 1)")
    _require(recipe, recipe.batch_size % recipe.micro_batches == 0, "micro_batches", "a divisor of batch_size")
    _check_data(recipe)
    _check_model(recipe)
    _check_optimizer(recipe)
    _check_mesh(recipe)
    images, paper = recipe.data.image_size is not None, recipe.protocol == "paper"
    _require(
        recipe,
        recipe.seed_mode in ("auto", "loop") or not images,
        "seed_mode",
        "loop or auto for image files, which every seed reads in its own order",
    )
    _require(
        recipe,
        not recipe.cache_features or (recipe.freeze == "backbone" and images),
        "cache_features",
        "used with --freeze backbone, on image files",
    )
    _require(recipe, recipe.feature_views == 0 or recipe.cache_features, "feature_views", "used with cache_features")
    _require(recipe, recipe.rounds == 1 or paper, "rounds", "1 unless --protocol paper")
    _require(recipe, recipe.ema_decay == 0.0 or not paper, "ema_decay", "0 with --protocol paper")
    evens = recipe.sampler == "balanced"
    _require(recipe, recipe.class_weights == "none" or not evens, "class_weights", "none with --sampler balanced")
    _require(recipe, recipe.data.shuffle or not evens, "sampler", "none without --data.shuffle")
    _require(recipe, recipe.patience >= 0, "patience", "at least 0")
    _require(recipe, not recipe.patience or not paper, "patience", "0 with --protocol paper")
    _require(recipe, not recipe.retrain or not paper, "retrain", "False with --protocol paper")


def refuses_batches_of_one(recipe: Any) -> bool:
    """Whether a batch norm of `recipe` sees one position of each example, and so refuses a batch of one."""
    model = recipe.model
    in_backbone = model.is_resnet and recipe.data.image_size == 32 and recipe.freeze == "none"
    return in_backbone or (model.norm == "batch" and model.head != "dense")


def _require(recipe: Any, holds: bool, name: str, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {operator.attrgetter(name)(recipe)}, expected {expected}")


def _check_data(recipe: Any) -> None:
    data = recipe.data
    mean, std = (each if isinstance(each, tuple) else () if each is None else (each,) for each in (data.mean, data.std))
    _require(recipe, all(abs(each) < _LARGEST for each in mean), "data.mean", "numbers within float32's range")
    _require(recipe, all(1 / _LARGEST < each < _LARGEST for each in std), "data.std", "above 0")
    _require(recipe, data.num_classes is None or data.num_classes >= 2, "data.num_classes", "at least 2")
    _require(recipe, data.num_validation >= 0, "data.num_validation", "at least 0")
    _require(recipe, data.split_seed >= 0, "data.split_seed", "at least 0")
    _require(recipe, 0.0 <= data.validation_fraction < 1.0, "data.validation_fraction", "in [0, 1)")
    _require(recipe, 0.0 < data.test_fraction < 1.0, "data.test_fraction", "in (0, 1)")
    size, resize, crops = data.image_size, data.resize, data.crops
    least = 8 if size == OWN else size  # the backbone's own is filled in, and looked at, later
    _require(recipe, least is None or 8 <= least <= 4096, "data.image_size", "8 .. 4096, or own")
    if resize is not None:
        _require(recipe, least is not None and least <= resize <= 8192, "data.resize", "image_size .. 8192")
        _require(
            recipe,
            resize == size or crops,
            "data.resize",
            "used with --data.augment rotation_crop_flip or resized_crop_flip, which crop to image_size",
        )
    _require(recipe, not crops or size is not None, "data.augment", "used with --data.image-size")


def _check_model(recipe: Any) -> None:
    model = recipe.model
    alone = recipe.batch_norm == "global" and recipe.batch_size == recipe.micro_batches  # run_mesh sees to per_device
    alone = alone and refuses_batches_of_one(recipe)
    _require(recipe, not alone, "batch_size", "2 or more a micro-batch for batch norm")
    for name, most in (("layer_width", 2**20), ("num_layers", 1000)):  # more would only fill the memory
        _require(recipe, 1 <= getattr(model, name) <= most, f"model.{name}", f"1 .. {most}")
    for name in ("dropout_rate", "layer_dropout_rate"):
        _require(recipe, 0.0 <= getattr(model, name) < 1.0, f"model.{name}", "in [0, 1)")
    _require(recipe, recipe.freeze == "none" or model.backbone != "none", "freeze", "none where there is no backbone")
    no_file = model.weights is not None and model.weights.lower() in _NO_WEIGHTS
    random = "None, written so, for random numbers, or pretrained for ImageNet weights"
    _require(recipe, not no_file, "model.weights", random)
    published = model.backbone not in ("none", "vgg5")
    _require(recipe, model.weights is None or published, "model.weights", "used with a ResNet or EfficientNet backbone")


def _check_optimizer(recipe: Any) -> None:
    optimizer = recipe.optimizer
    rate = optimizer.learning_rate
    _require(recipe, 0 < rate < _LARGEST, "optimizer.learning_rate", "above 0")
    _require(recipe, 0.0 <= optimizer.momentum < 1.0, "optimizer.momentum", "in [0, 1)")
    decay = optimizer.weight_decay
    _require(recipe, 0.0 <= decay < _LARGEST, "optimizer.weight_decay", "at least 0")
    _require(recipe, optimizer.decay_epochs >= 1, "optimizer.decay_epochs", "at least 1")
    _require(recipe, 0.0 <= optimizer.warmup_fraction < 1.0, "optimizer.warmup_fraction", "in [0, 1)")
    whole = 0.0 <= optimizer.warmup_epochs < recipe.epochs
    _require(recipe, whole, "optimizer.warmup_epochs", "at least 0 and fewer than epochs")
    _require(recipe, 0.0 < optimizer.backbone_rate < _LARGEST, "optimizer.backbone_rate", "above 0")
    steered = optimizer.steering == "best_on_test"
    _require(recipe, not steered or recipe.protocol == "paper", "optimizer.steering", "none unless --protocol paper")


def _check_mesh(recipe: Any) -> None:
    mesh = recipe.mesh
    _require(recipe, mesh.data == -1 or mesh.data >= 1, "mesh.data", "at least 1, or -1")
    for name in ("fsdp", "model"):
        length = getattr(mesh, name)
        _require(recipe, length >= 1, f"mesh.{name}", "at least 1")
        _require(
            recipe,
            length == 1 or recipe.batch_norm == "global",
            f"mesh.{name}",
            "1 with --batch-norm per_device, whose devices hold all parameters",
        )
