"""The heads that are compared, and their sizes."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn

from pspinal_jax.heads import DenseHead, MLPHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.heads.baselines import matching_width
from pspinal_jax.models import abstract_variables, count_parameters

HeadName = Literal["progressive", "spinal", "mlp", "dense"]
HEADS: tuple[HeadName, ...] = ("progressive", "spinal", "mlp", "dense")
Match = Literal["published", "parameters"]


def build_head(
    name: HeadName, num_features: int, num_classes: int, layer_width: int, num_layers: int, match: Match
) -> tuple[nn.Module, int]:
    """A head and its number of trainable parameters.

    Args:
      name: which.
      num_features: D.
      num_classes: C.
      layer_width: width of each hidden layer of `progressive`, and as published of `spinal`.
      num_layers: how many hidden layers these two have.
      match: 'published': `spinal` has `layer_width` too. 'parameters': it has the width at which it comes closest to
        the parameters of `progressive`. `mlp` always has; `dense` has no width to choose.
    """

    def size(head: nn.Module) -> int:
        return count_parameters(abstract_variables(head, (num_features,))["params"])

    progressive = ProgressiveSpinalHead(num_classes, layer_width, num_layers)
    goal = size(progressive)
    if name == "progressive":
        return progressive, goal
    if name == "dense":
        head: nn.Module = DenseHead(num_classes)
    elif name == "mlp":
        head = MLPHead(num_classes, matching_width(goal, num_features, num_classes, batch_norm=False))
    else:

        def spinal(width: int) -> nn.Module:
            return SpinalHead(num_classes, width, num_layers)

        width = layer_width if match == "published" else _closest(lambda width: size(spinal(width)), goal)
        head = spinal(width)
    return head, size(head)


def _closest(size: Callable[[int], int], goal: int) -> int:
    """The width at which the growing function `size` comes closest to `goal`."""
    low, high = 1, 2
    while size(high) < goal:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) >= goal else (middle, high)
    return min((low, high), key=lambda width: abs(size(width) - goal))


def describe_head(head: Any) -> str:
    """Its hidden layers in a few words."""
    if isinstance(head, DenseHead):
        return "no hidden layer"
    layers = getattr(head, "num_layers", 1)
    return f"{layers} hidden layer{'s' if layers > 1 else ''} of {head.layer_width}"
