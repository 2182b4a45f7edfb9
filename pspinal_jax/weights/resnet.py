"""torchvision's ResNets and the classifiers of the published scripts, backbone and progressive head, both ways."""

import dataclasses
import functools
import re
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import numpy as np

from pspinal_jax.backbones.resnet import MIN_SIDE, VARIANTS, ResNet, ResNetName
from pspinal_jax.backbones.vgg5 import IMAGE_SHAPE, VGG5
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.heads.equation import read_layers
from pspinal_jax.layers.linear import Norm, check_choice
from pspinal_jax.models import Classifier, abstract_variables
from pspinal_jax.weights.hub import PREFIX
from pspinal_jax.weights.state_dict import Entry, StateDict, entries_of, to_state_dict, to_variables, unwrapped

PRETRAINED: dict[str, str] = {variant: f"{PREFIX}timm/{variant}.tv_in1k" for variant in VARIANTS}
"""Where the hub has torchvision's IMAGENET1K_V1 weights of each variant, as `read_state_dict` takes it."""

CLASSIFIER = ("fc.weight", "fc.bias")
"""The 1000-class layer of the published ImageNet weights."""


def resnet_variables(state_dict: StateDict, variant: str, *, drop: tuple[str, ...] = CLASSIFIER) -> dict[str, Any]:
    """Variables of our `ResNet` from torchvision's (or timm's) state dict, all of whose other tensors must be used.

    Args:
      state_dict: names to arrays, see `read_state_dict`.
      variant: of the `ResNet`.
      drop: names of tensors to ignore if they are present.

    Returns:
      ``{'params': .., 'batch_stats': ..}`` of NumPy arrays, in their original dtype (float32 for half precision).

    Raises:
      DataError: if tensors are missing, left over or of another shape; all of them are listed.
      ValueError: if there is no such variant.
    """
    kept = {name: array for name, array in unwrapped(state_dict).items() if name not in drop}
    return to_variables(kept, _entries(variant), variant)


def resnet_state_dict(variables: Mapping[str, Any], variant: str) -> dict[str, np.ndarray]:
    """The inverse of `resnet_variables`: torchvision's names and order of axes, without ``fc``.

    Raises:
      DataError: if `variables` are not those of our `ResNet`.
      ValueError: if there is no such variant.
    """
    return to_state_dict(variables, _entries(variant), variant)


def resnet_module(layer: str, is_norm: bool) -> str:
    """The torchvision module of a layer of our `ResNet`, such as "stage_1/block_2/conv_1", or of its batch norm."""
    if layer == "stem":
        return "bn1" if is_norm else "conv1"
    stage, block, part = (name.rpartition("_")[2] for name in layer.split("/"))
    module = f"downsample.{int(is_norm)}" if part == "shortcut" else f"{'bn' if is_norm else 'conv'}{part}"
    return f"layer{stage}.{int(block) - 1}.{module}"


@functools.cache
def _entries(variant: str) -> list[Entry]:
    check_choice("variant", variant, tuple(VARIANTS))
    shapes = abstract_variables(ResNet(cast(ResNetName, variant)), (MIN_SIDE, MIN_SIDE, 3))
    return entries_of(shapes, resnet_module)


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
    """Variables of our `Classifier` from a published script's state dict, all of whose tensors must be used.

    The head's sizes (width, classes, number of layers; for 'mnist' also features) are inferred from the tensors.

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
    """The inverse of `classifier_variables`: the script's names and torch's order of axes.

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
    """The head's sizes, as most of its tensors have them; 1 where none of them tells."""
    pattern = rf"{re.escape(layout.head_prefix)}fc_(spinal_layer(\d+)|out)\.{int(layout.dropout_first)}\.weight"
    shapes = {
        int(match[2] or 0): array.shape
        for name, array in state_dict.items()
        if (match := re.fullmatch(pattern, name)) and array.ndim == 2
    }
    classes = shapes.pop(0, (1,))[0]
    width = statistics.mode([shape[0] for shape in shapes.values()] or [1])
    features = statistics.mode([shape[1] - (index - 1) * width for index, shape in shapes.items()] or [1])
    layers = min(max(shapes, default=4), max(len(state_dict), 4))
    return _Sizes(max(features, 1), max(width, 1), layers, max(classes, 1))


def _layout_entries(layout: Layout, sizes: _Sizes) -> list[Entry]:
    norm: Norm = "batch" if layout.batch_norm else None
    head = ProgressiveSpinalHead(sizes.classes, sizes.width, sizes.layers, norm=norm, implementation="unrolled")
    backbone: nn.Module | None = None
    shape: tuple[int, ...] = (sizes.features,)
    if layout.backbone == "vgg5":
        backbone, shape = VGG5(), IMAGE_SHAPE
    elif layout.backbone != "none":
        backbone, shape = ResNet(cast(ResNetName, layout.backbone)), (MIN_SIDE, MIN_SIDE, 3)

    def module_of(layer: str, is_norm: bool) -> str:
        part, _, layer = layer.partition("/")
        if part == "head":
            name = "out" if layer == "output" else f"spinal_{layer.replace('_', '')}"
            return f"{layout.head_prefix}fc_{name}.{layout.dropout_first + is_norm}"
        return (_vgg5_module if layout.backbone == "vgg5" else resnet_module)(layer, is_norm)

    return entries_of(abstract_variables(Classifier(head, backbone), shape), module_of)


def _vgg5_module(layer: str, is_norm: bool) -> str:
    """Stage s is an nn.Sequential ls of convolution, batch norm and ReLU in turn."""
    stage, conv = (int(name.rpartition("_")[2]) for name in layer.split("/"))
    return f"l{stage}.{3 * (conv - 1) + is_norm}"
