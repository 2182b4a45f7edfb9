"""torchvision's ResNets, both ways."""

import functools
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from pspinal_jax.backbones.resnet import LEAST_SIDE, VARIANTS, ResNet, ResNetName, block_convs, num_features
from pspinal_jax.models import abstract_variables
from pspinal_jax.weights.hub import PREFIX
from pspinal_jax.weights.layout import Entry, Layer, StateDict, entries_of, to_state_dict, to_variables, unwrapped

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
    shapes = abstract_variables(ResNet(cast(ResNetName, variant)), (LEAST_SIDE, LEAST_SIDE, 3))
    return entries_of(resnet_layers(variant), shapes)
