"""Parameters from PyTorch, and back: state dicts from files or the hub, and linen's variables; a file for those."""

from pspinal_jax.weights.files import read_state_dict
from pspinal_jax.weights.published import LAYOUTS, classifier_state_dict, classifier_variables
from pspinal_jax.weights.resnet import PRETRAINED, resnet_state_dict, resnet_variables
from pspinal_jax.weights.variables import read_variables, save_variables

__all__ = [
    "LAYOUTS",
    "PRETRAINED",
    "classifier_state_dict",
    "classifier_variables",
    "read_state_dict",
    "read_variables",
    "resnet_state_dict",
    "resnet_variables",
    "save_variables",
]
