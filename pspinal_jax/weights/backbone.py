"""The weights that a recipe names for its backbone, as our variables."""

from typing import Any

from pspinal_jax.backbones.efficientnet import SCALES
from pspinal_jax.weights.efficientnet import efficientnet_variables, pretrained_efficientnet
from pspinal_jax.weights.files import read_state_dict
from pspinal_jax.weights.resnet import PRETRAINED, resnet_variables


def backbone_variables(name: str, source: str) -> dict[str, Any]:
    """Variables of the backbone `name`, without their classifier.

    Args:
      name: a ResNet or an EfficientNet.
      source: 'pretrained', or what `read_state_dict` takes.

    Returns:
      ``{'params': .., 'batch_stats': ..}`` of NumPy arrays.

    Raises:
      DataError: if the weights cannot be had or read, or do not fit.
    """
    pretrained = source == "pretrained"
    if name in SCALES:
        return efficientnet_variables(pretrained_efficientnet(name) if pretrained else read_state_dict(source), name)
    return resnet_variables(read_state_dict(PRETRAINED[name] if pretrained else source), name)
