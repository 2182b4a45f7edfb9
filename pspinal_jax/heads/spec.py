"""What the head computes, apart from how: the hashable description that both implementations take."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Activation = Callable[[jax.Array], jax.Array]
Tree = dict[str, Any]
"""A nested dict of arrays, as in linen's variable collections."""


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """Static description of a progressive head; see `ProgressiveSpinalHead` for the meaning of each field."""

    num_classes: int
    layer_width: int
    num_layers: int
    dropout_rate: float
    layer_dropout_rate: float
    batch_norm: bool
    activation: Activation


def layer_name(index: int) -> str:
    """Name of hidden layer `index`, counted from 1 as in the paper."""
    return f"layer_{index}"
