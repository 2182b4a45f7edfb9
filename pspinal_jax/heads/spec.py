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


def input_key(dropout_key: jax.Array) -> jax.Array:
    """Key of the mask on the features that layers 2 .. L and the output share."""
    return jax.random.fold_in(dropout_key, 0)


def layer_key(dropout_key: jax.Array, index: jax.Array | int) -> jax.Array:
    """Key of the mask on the whole input of layer `index` (1 .. L) or of the output (L + 1)."""
    return jax.random.fold_in(dropout_key, index)
