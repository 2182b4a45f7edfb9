"""From a recipe's model configuration to a linen module."""

import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.backbones import efficientnet
from pspinal_jax.backbones.resnet import LEAST_SIDE, ResNet, ResNetName, num_features
from pspinal_jax.backbones.vgg5 import IMAGE_SHAPE, NUM_FEATURES, VGG5
from pspinal_jax.errors import UsageError
from pspinal_jax.heads import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.heads.baselines import matching_width
from pspinal_jax.models.classifier import Classifier
from pspinal_jax.models.preprocessing import normalisation
from pspinal_jax.recipes.schema import Recipe


def build_model(recipe: Recipe, input_shape: tuple[int, ...], num_classes: int) -> Classifier:
    """The model of `recipe` for inputs of `input_shape` (one example's) and `num_classes` classes.

    Raises:
      UsageError: if the backbone does not take such inputs.
    """
    dtype = jnp.dtype(recipe.dtype)
    backbone = _build_backbone(recipe, input_shape, dtype)
    head = _build_head(recipe, count_features(recipe, input_shape), num_classes, dtype)
    mean, std = normalisation(recipe)
    return Classifier(
        head=head,
        backbone=backbone,
        mean=mean,
        std=std,
        freeze_backbone=recipe.freeze == "backbone",
        dtype=dtype,
    )


def count_features(recipe: Recipe, input_shape: tuple[int, ...]) -> int:
    """Length D of the features that the head of `recipe` sees, for inputs of `input_shape`."""
    name = recipe.model.backbone
    if name == "none":
        return math.prod(input_shape)
    if name in efficientnet.SCALES:
        return efficientnet.NUM_FEATURES
    return NUM_FEATURES if name == "vgg5" else num_features(name)


def abstract_variables(model: nn.Module, example_shape: tuple[int, ...], dtype: Any = jnp.float32) -> dict[str, Any]:
    """Shapes and dtypes of what ``model.init`` makes for examples of that shape and dtype; nothing is computed."""
    inputs = jax.ShapeDtypeStruct((2, *example_shape), dtype)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), inputs)


def count_parameters(params: Any) -> int:
    """Number of trainable parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _build_backbone(recipe: Recipe, input_shape: tuple[int, ...], dtype: Any) -> nn.Module | None:
    name = recipe.model.backbone
    if name == "none":
        return None
    if name == "vgg5":
        if input_shape != IMAGE_SHAPE:
            raise UsageError(f"the backbone vgg5 takes images of shape {IMAGE_SHAPE}, the data set has {input_shape}")
        return VGG5(dtype=dtype)
    if len(input_shape) != 3 or input_shape[2] != 3 or min(input_shape[:2]) < LEAST_SIDE:
        raise UsageError(
            f"the backbone {name} takes colour images [H, W, 3] of {LEAST_SIDE} pixels and more, the data set has "
            f"{input_shape}"
        )
    if name in efficientnet.SCALES:
        return efficientnet.EfficientNetLite(cast(efficientnet.EfficientNetName, name), dtype=dtype)
    return ResNet(cast(ResNetName, name), dtype=dtype, remat=recipe.model.remat)


def _build_head(recipe: Recipe, num_features: int, num_classes: int, dtype: Any) -> nn.Module:
    model = recipe.model
    progressive = ProgressiveSpinalHead(
        num_classes,
        model.layer_width,
        num_layers=model.num_layers,
        dropout_rate=model.dropout_rate,
        layer_dropout_rate=model.layer_dropout_rate,
        norm=model.norm,
        implementation=model.implementation,
        dtype=dtype,
    )
    if model.head == "progressive":
        return progressive
    if model.head == "spinal":
        return SpinalHead(num_classes, model.layer_width, model.num_layers, model.dropout_rate, model.norm, dtype=dtype)
    if model.head == "dense":
        return DenseHead(num_classes, model.dropout_rate, dtype=dtype)
    params = abstract_variables(progressive, (num_features,), dtype)["params"]
    width = matching_width(count_parameters(params), num_features, num_classes, model.norm == "batch")
    return MLPHead(num_classes, width, model.dropout_rate, model.norm, dtype=dtype)
