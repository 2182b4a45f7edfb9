"""torchvision's ResNets and the classifiers of the published scripts, backbone and progressive head, both ways."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import numpy as np

from pspinal_jax.backbones.resnet import MIN_SIDE, VARIANTS, ResNet, ResNetName, block_convs, num_features
from pspinal_jax.backbones.vgg5 import IMAGE_SHAPE, STAGES, VGG5
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.heads.equation import layer_name, read_layers
from pspinal_jax.layers.linear import check_choice
from pspinal_jax.models import Classifier, abstract_variables
from pspinal_jax.weights.hub import PREFIX
from pspinal_jax.weights.state_dict import Entry, Layer, StateDict, entries_of, to_state_dict, to_variables, unwrapped

_HEAD = ("head",)
_BACKBONE = ("backbone",)

PRETRAINED: dict[str, str] = {variant: f"{PREFIX}timm/{variant}.tv_in1k" for variant in VARIANTS}
"""Where the hub has torchvision's IMAGENET1K_V1 weights of each variant, as `read_state_dict` takes it."""

CLASSIFIER = ("fc.weight", "fc.bias")
"""The 1000-class layer of the published ImageNet weights."""


def resnet_variables(state_dict: StateDict, variant: str, *, drop: tuple[str, ...] = CLASSIFIER) -> dict[str, Any]:
    """Variables of our `ResNet` from torchvision's (or timm's) state dict; every other tensor has to be used.

    Args:
      state_dict: names to arrays, see `read_state_dict`.
      variant: of the `ResNet`.
      drop: tensors to leave out knowingly, where they are there.

    Returns:
      ``{'params': .., 'batch_stats': ..}`` of NumPy arrays, in the dtype they came in (float32 for half precision).

    Raises:
      DataError: if tensors are missing, left over or of another shape; all of them are listed.
      ValueError: if there is no such variant.
    """
    kept = {name: array for name, array in unwrapped(state_dict).items() if name not in drop}
    return to_variables(kept, _entries(variant), variant)


def resnet_state_dict(variables: Mapping[str, Any], variant: str) -> dict[str, np.ndarray]:
    """The way back: torchvision's names and order of axes, without ``fc``.

    Raises:
      DataError: if `variables` are not those of our `ResNet`.
      ValueError: if there is no such variant.
    """
    return to_state_dict(variables, _entries(variant), variant)


def resnet_layers(variant: str, path: tuple[str, ...] = ()) -> list[Layer]:
    """Our layers, lying under `path`, and torchvision's modules of each.

    Raises:
      ValueError: if there is no such variant.
    """
    num_features(variant)  # raises for an unknown one
    layers = [Layer((*path, "stem"), "conv1", "bn1")]
    for stage, depth in enumerate(VARIANTS[variant].depths, start=1):
        for block in range(depth):
            ours, theirs = (*path, f"stage_{stage}", f"block_{block + 1}"), f"layer{stage}.{block}"
            for i in range(1, len(block_convs(VARIANTS[variant], 1, 1)) + 1):
                layers.append(Layer((*ours, f"conv_{i}"), f"{theirs}.conv{i}", f"{theirs}.bn{i}"))
            layers.append(Layer((*ours, "shortcut"), f"{theirs}.downsample.0", f"{theirs}.downsample.1"))
    return layers


@functools.cache
def _entries(variant: str) -> list[Entry]:
    shapes = abstract_variables(ResNet(cast(ResNetName, variant)), (MIN_SIDE, MIN_SIDE, 3))
    return entries_of(resnet_layers(variant), shapes)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a published script names its tensors.

    Attributes:
      backbone: 'none', 'vgg5' or a ResNet variant.
      head_prefix: what stands before the names of the head's modules.
      dropout_first: whether each layer of the head begins with dropout, so that its linear module is number 1, not 0.
      batch_norm: whether each hidden layer of the head has batch norm, the module after the linear one.
    """

    backbone: str
    head_prefix: str = ""
    dropout_first: bool = False
    batch_norm: bool = False


LAYOUTS: dict[str, Layout] = {
    "mnist": Layout("none", batch_norm=True),
    "vgg5": Layout("vgg5"),
    "qmnist": Layout("vgg5", dropout_first=True, batch_norm=True),
    **{variant: Layout(variant, head_prefix="fc.") for variant in VARIANTS},
}
"""By script (praveenchopra/ProgressiveSpinalNet): 'mnist' is the head alone; 'vgg5' KMNIST's and both EMNISTs';
'wide_resnet101_2' Caltech-101's, STL-10's, Fruits-360's and Bird-225's, and likewise for the other ResNets."""


class _Sizes(NamedTuple):
    features: int
    width: int
    layers: int
    classes: int


def classifier_variables(state_dict: StateDict, layout: str) -> dict[str, Any]:
    """Variables of our `Classifier` from a published script's state dict; every tensor has to be used.

    The head's sizes (width, classes, number of layers; for 'mnist' features) are those of its tensors.

    Args:
      state_dict: names to arrays, see `read_state_dict`.
      layout: a key of `LAYOUTS`.

    Returns:
      ``{'params': {'backbone': .., 'head': ..}, 'batch_stats': ..}`` of NumPy arrays, in the dtype they came in
      (float32 for half precision); without 'backbone' for 'mnist'.

    Raises:
      DataError: if tensors are missing, left over or of another shape; all of them are listed.
      ValueError: if there is no such layout.
    """
    published, state_dict = _layout(layout), unwrapped(state_dict)
    entries = _layout_entries(published, _sizes_in(state_dict, published))
    return to_variables(state_dict, entries, f"the layout {layout!r}")


def classifier_state_dict(variables: Mapping[str, Any], layout: str) -> dict[str, np.ndarray]:
    """The way back: the script's names and torch's order of axes.

    Raises:
      DataError: if `variables` are not those of such a `Classifier`.
      ValueError: if there is no such layout, or the head is not a progressive one in its documented layout.
    """
    published = _layout(layout)
    layers, output = read_layers(variables["params"].get("head", {}), "classifier_state_dict")
    features, width = layers[0]["kernel"].shape
    sizes = _Sizes(features, width, len(layers), output["kernel"].shape[1])
    return to_state_dict(variables, _layout_entries(published, sizes), f"the layout {layout!r}")


def _layout(name: str) -> Layout:
    check_choice("layout", name, tuple(LAYOUTS))
    return LAYOUTS[name]


def _sizes_in(state_dict: StateDict, layout: Layout) -> _Sizes:
    """The head's sizes, from whichever of its tensors are there; 1 where none of them has it."""
    matches = (re.match(re.escape(layout.head_prefix) + r"fc_spinal_layer(\d+)\.", name) for name in state_dict)
    numbers = [int(match[1]) for match in matches if match]
    count = min(max(numbers, default=4), max(len(state_dict), 4))
    layers = _head_layers(layout, count)

    def side(layer: Layer, axis: int) -> int | None:
        weight, bias = (state_dict.get(f"{layer.weights}.{leaf}") for leaf in ("weight", "bias"))
        if weight is not None and weight.ndim == 2:
            return weight.shape[axis]
        return bias.shape[0] if axis == 0 and bias is not None and bias.ndim == 1 else None

    width = next((found for layer in layers[:-1] if (found := side(layer, 0))), 1)
    inputs = ((side(layer, 1), index) for index, layer in enumerate(layers[:-1]))
    features = next((found - index * width for found, index in inputs if found), 1)
    return _Sizes(max(features, 1), width, count, side(layers[-1], 0) or 1)


def _head_layers(layout: Layout, count: int) -> list[Layer]:
    """Of hidden layers 1 .. count and the output."""
    linear = int(layout.dropout_first)
    layers = []
    for index in range(1, count + 1):
        theirs = f"{layout.head_prefix}fc_spinal_layer{index}"
        layers.append(Layer((*_HEAD, layer_name(index)), f"{theirs}.{linear}", f"{theirs}.{linear + 1}"))
    return [*layers, Layer((*_HEAD, "output"), f"{layout.head_prefix}fc_out.{linear}")]


def _vgg5_layers() -> list[Layer]:
    """Stage s is an nn.Sequential ls of convolution, batch norm and ReLU in turn."""
    return [
        Layer((*_BACKBONE, f"stage_{s}", f"conv_{i + 1}"), f"l{s}.{3 * i}", f"l{s}.{3 * i + 1}")
        for s, channels in enumerate(STAGES, start=1)
        for i in range(len(channels))
    ]


def _layout_entries(layout: Layout, sizes: _Sizes) -> list[Entry]:
    head = ProgressiveSpinalHead(
        sizes.classes, sizes.width, sizes.layers, norm="batch" if layout.batch_norm else None, implementation="unrolled"
    )
    backbone: nn.Module | None = None
    layers = _head_layers(layout, sizes.layers)
    shape: tuple[int, ...] = (sizes.features,)
    if layout.backbone == "vgg5":
        backbone, layers, shape = VGG5(), layers + _vgg5_layers(), IMAGE_SHAPE
    elif layout.backbone != "none":
        backbone, shape = ResNet(cast(ResNetName, layout.backbone)), (MIN_SIDE, MIN_SIDE, 3)
        layers = layers + resnet_layers(layout.backbone, _BACKBONE)
    return entries_of(layers, abstract_variables(Classifier(head, backbone), shape))
