"""Whole models from a recipe: preprocessing, backbone and head as one linen module."""

import dataclasses
import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.backbones import efficientnet
from pspinal_jax.backbones.preprocessing import default_preprocessing
from pspinal_jax.backbones.resnet import MIN_SIDE, ResNet, ResNetName, num_features
from pspinal_jax.backbones.vgg5 import IMAGE_SHAPE, NUM_FEATURES, VGG5
from pspinal_jax.errors import UsageError
from pspinal_jax.heads import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.heads.baselines import matching_width
from pspinal_jax.recipes.schema import OWN, Recipe

Number = float | tuple[float, float, float]


class Classifier(nn.Module):
    """Logits of raw inputs: preprocessing, then the backbone's features, then the head.

    Attributes:
      head: a module called as ``head(features [N, D], train) -> logits [N, C]``.
      backbone: a module called as ``backbone(images, train) -> features [N, D]``, or None to flatten the inputs.
      mean: mean subtracted from images scaled to 0 .. 1, a number or one per channel.
      std: standard deviation that images are then divided by.
      freeze_backbone: whether the backbone normalises with its running statistics in training too, which stay the same,
        and gets no gradient.
      dtype: dtype of computations.
    """

    head: nn.Module
    backbone: nn.Module | None = None
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    freeze_backbone: bool = False
    dtype: Any = jnp.float32

    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """Logits [N, C] of images uint8 [N, H, W, C'], or of features [N, D], which are used unchanged."""
        return self.head(self.features(inputs, train), train)

    def features_and_logits(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The head's input [N, D] and its logits [N, C], in evaluation."""
        features = self.features(inputs, False)
        return features, self.head(features, False)

    def features(self, inputs: jax.Array, train: bool) -> jax.Array:
        """The head's input: the backbone's features [N, D] of `inputs`, or the flattened inputs."""
        if inputs.dtype == jnp.uint8:
            mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
            inputs = (inputs.astype(jnp.float32) / 255 - mean) / std
        inputs = inputs.astype(self.dtype)
        if self.backbone is None:
            return inputs.reshape(inputs.shape[0], -1)  # the batch may be symbolic, which len refuses
        if self.freeze_backbone:
            return jax.lax.stop_gradient(self.backbone(inputs, False))
        return self.backbone(inputs, train)


def build_model(recipe: Recipe, input_shape: tuple[int, ...], num_classes: int) -> Classifier:
    """The model of `recipe` for inputs of `input_shape` (one example's) and `num_classes` classes.

    Raises:
      UsageError: if the backbone does not take such inputs.
    """
    dtype = jnp.dtype(recipe.dtype)
    backbone = _build_backbone(recipe, input_shape, dtype)
    head = _build_head(recipe, count_features(recipe, input_shape), num_classes, dtype)
    return Classifier(head, backbone, *normalisation(recipe), recipe.freeze == "backbone", dtype)


def count_features(recipe: Recipe, input_shape: tuple[int, ...]) -> int:
    """Length D of the features that the head of `recipe` sees, for inputs of `input_shape`."""
    name = recipe.model.backbone
    if name == "none":
        return math.prod(input_shape)
    if name in efficientnet.SCALES:
        return efficientnet.NUM_FEATURES
    return NUM_FEATURES if name == "vgg5" else num_features(name)


def abstract_variables(model: nn.Module, example_shape: tuple[int, ...], dtype: Any = jnp.float32) -> dict[str, Any]:
    """Shapes and dtypes of the variables from ``model.init`` for examples of that shape and dtype."""
    inputs = jax.ShapeDtypeStruct((2, *example_shape), dtype)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), inputs)


def count_parameters(params: Any) -> int:
    """Number of trainable parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def normalisation(recipe: Recipe) -> tuple[Number, Number]:
    """Mean and std of `recipe`, by default its backbone's."""
    default, data = default_preprocessing(recipe.model.backbone), recipe.data
    return default.mean if data.mean is None else data.mean, default.std if data.std is None else data.std


def with_default_preprocessing(recipe: Recipe) -> Recipe:
    """`recipe` with the backbone's image size, mean and std filled in, as config.json records them.

    Raises:
      UsageError: if the image size is the backbone's default, but the backbone has none.
    """
    mean, std = normalisation(recipe)
    size = recipe.data.image_size
    if size == OWN:
        size = default_preprocessing(recipe.model.backbone).image_size
        if size is None:
            raise UsageError(
                f"data.image_size is {OWN}, but the backbone {recipe.model.backbone} has no default; give a number"
            )
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, mean=mean, std=std, image_size=size))


def _build_backbone(recipe: Recipe, input_shape: tuple[int, ...], dtype: Any) -> nn.Module | None:
    name = recipe.model.backbone
    if name == "none":
        return None
    if name == "vgg5":
        if input_shape != IMAGE_SHAPE:
            raise UsageError(f"the backbone vgg5 takes images of shape {IMAGE_SHAPE}, the data set has {input_shape}")
        return VGG5(dtype=dtype)
    if len(input_shape) != 3 or input_shape[2] != 3 or min(input_shape[:2]) < MIN_SIDE:
        raise UsageError(
            f"the backbone {name} takes colour images [H, W, 3] of {MIN_SIDE} pixels and more, the data set has "
            f"{input_shape}"
        )
    if name in efficientnet.SCALES:
        return efficientnet.EfficientNetLite(cast(efficientnet.EfficientNetName, name), dtype=dtype)
    return ResNet(cast(ResNetName, name), dtype=dtype, remat=recipe.model.remat)


HEADS: dict[str, Any] = {"progressive": ProgressiveSpinalHead, "spinal": SpinalHead, "mlp": MLPHead, "dense": DenseHead}


def _build_head(recipe: Recipe, num_features: int, num_classes: int, dtype: Any) -> nn.Module:
    """The head, whose attributes are the settings of the model that have the same names."""

    def make(kind: Any) -> nn.Module:
        names = {field.name for field in dataclasses.fields(kind)}
        settings = {name: value for name, value in vars(recipe.model).items() if name in names}
        head: nn.Module = kind(num_classes, dtype=dtype, **settings)
        return head

    head = make(HEADS[recipe.model.head])
    if isinstance(head, MLPHead):
        params = abstract_variables(make(ProgressiveSpinalHead), (num_features,), dtype)["params"]
        has_norm = recipe.model.norm == "batch"
        width = matching_width(count_parameters(params), num_features, num_classes, has_norm)
        head = head.clone(layer_width=width)
    return head
