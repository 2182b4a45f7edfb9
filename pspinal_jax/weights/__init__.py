"""Parameters from PyTorch, and back: state dicts from files or the hub, and linen's variables; a file for those."""

from pspinal_jax.weights.efficientnet import (
    backbone_variables,
    efficientnet_state_dict,
    efficientnet_variables,
    pretrained_efficientnet,
)
from pspinal_jax.weights.resnet import (
    LAYOUTS,
    PRETRAINED,
    classifier_state_dict,
    classifier_variables,
    resnet_state_dict,
    resnet_variables,
)
from pspinal_jax.weights.state_dict import read_state_dict
from pspinal_jax.weights.variables import read_variables, save_variables

# fmt: off
__all__ = [
    "LAYOUTS", "PRETRAINED", "backbone_variables", "classifier_state_dict", "classifier_variables",
    "efficientnet_state_dict", "efficientnet_variables", "pretrained_efficientnet", "read_state_dict", "read_variables",
    "resnet_state_dict", "resnet_variables", "save_variables",
]
# fmt: on
