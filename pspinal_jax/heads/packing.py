"""The head's parameters as a handful of arrays, so that a loop over layers compiles to a program of fixed size.

Packed form, and what it holds of the documented tree (layer_i/kernel [D + (i-1) W, W] for i = 1 .. L,
output/kernel [D + L W, C], biases, norms):

  first_kernel     [D, W]            layer 1, which sees x
  features_kernel  [D, (L-1) W + C]  what layers 2 .. L, and then the output, make of u
  hidden_kernel    [L, L W, W]       what layer i makes of y_1 .. y_{i-1}; its rows from (i-1) W on are zero
  output_kernel    [L W, C]          what the output makes of y_1 .. y_L
  hidden_bias      [L, W]            layer_i/bias
  output_bias      [C]               output/bias
  norm_scale, norm_bias  [L, W]      layer_i/norm/scale, layer_i/norm/bias
  norm_mean, norm_var    [L, W]      batch_stats: layer_i/norm/mean, layer_i/norm/var

The zero rows stay zero in training: their gradient is zero.
"""

import jax
import jax.numpy as jnp

from pspinal_jax.heads.spec import Tree, layer_name
from pspinal_jax.heads.tree import read_layers

PACKED_PARAMS = ("first_kernel", "features_kernel", "hidden_kernel", "output_kernel", "hidden_bias", "output_bias")
_NORM_PARAMS = {"norm_scale": "scale", "norm_bias": "bias"}
_NORM_STATS = {"norm_mean": "mean", "norm_var": "var"}


def packed_shapes(
    num_features: int, width: int, num_layers: int, num_classes: int, batch_norm: bool
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the packed form of a head: ``{'params': {name: shape}, 'batch_stats': {name: shape}}``."""
    hidden = num_layers * width
    params: dict[str, tuple[int, ...]] = {
        "first_kernel": (num_features, width),
        "features_kernel": (num_features, hidden - width + num_classes),
        "hidden_kernel": (num_layers, hidden, width),
        "output_kernel": (hidden, num_classes),
        "hidden_bias": (num_layers, width),
        "output_bias": (num_classes,),
    }
    norm: dict[str, tuple[int, ...]] = dict.fromkeys(_NORM_PARAMS, (num_layers, width)) if batch_norm else {}
    stats: dict[str, tuple[int, ...]] = dict.fromkeys(_NORM_STATS, (num_layers, width)) if batch_norm else {}
    return {"params": params | norm, "batch_stats": stats}


def is_packed(params: Tree) -> bool:
    """Whether `params` is the packed form rather than the documented tree."""
    return "hidden_kernel" in params


def pack_params(params: Tree) -> Tree:
    """The packed form of a head's parameters.

    Args:
      params: the documented tree of one head, e.g. ``variables['params']`` of a `ProgressiveSpinalHead`.
        A tree of the same structure (gradients, momenta) packs as well.

    Returns:
      The packed form (see the table at the top of this module); `unpack_params` undoes it exactly.

    Raises:
      ValueError: if `params` is not such a tree.
    """
    layers, output = read_layers(params, "pack_params")
    num_features, width = layers[0]["kernel"].shape
    hidden_width = len(layers) * width
    features = [layer["kernel"][:num_features] for layer in layers[1:]] + [output["kernel"][:num_features]]
    hidden = [
        jnp.pad(kernel, ((0, hidden_width - kernel.shape[0]), (0, 0)))
        for kernel in (layer["kernel"][num_features:] for layer in layers)
    ]
    packed = {
        "first_kernel": layers[0]["kernel"],
        "features_kernel": jnp.concatenate(features, axis=1),
        "hidden_kernel": jnp.stack(hidden),
        "output_kernel": output["kernel"][num_features:],
        "hidden_bias": jnp.stack([layer["bias"] for layer in layers]),
        "output_bias": output["bias"],
    }
    if "norm" in layers[0]:
        packed |= _stack(layers, _NORM_PARAMS)
    return packed


def unpack_params(packed: Tree) -> Tree:
    """The documented tree of a packed head; the inverse of `pack_params`.

    Raises:
      ValueError: if `packed` lacks one of the packed arrays.
    """
    missing = [name for name in PACKED_PARAMS if name not in packed]
    if missing:
        raise ValueError(f"unpack_params misses {', '.join(missing)}; it takes what pack_params returns")
    num_layers, _, width = packed["hidden_kernel"].shape
    split = (num_layers - 1) * width
    of_features = [packed["first_kernel"]]
    of_features += [packed["features_kernel"][:, i * width : (i + 1) * width] for i in range(num_layers - 1)]
    params: Tree = {}
    for i in range(num_layers):
        hidden = packed["hidden_kernel"][i, : i * width]
        layer = {"kernel": jnp.concatenate([of_features[i], hidden]), "bias": packed["hidden_bias"][i]}
        if "norm_scale" in packed:
            layer["norm"] = {name: packed[key][i] for key, name in _NORM_PARAMS.items()}
        params[layer_name(i + 1)] = layer
    params["output"] = {
        "kernel": jnp.concatenate([packed["features_kernel"][:, split:], packed["output_kernel"]]),
        "bias": packed["output_bias"],
    }
    return params


def pack_batch_stats(batch_stats: Tree) -> Tree:
    """The packed form of a head's ``batch_stats``: ``{'norm_mean': [L, W], 'norm_var': [L, W]}``, {} for {}."""
    return _stack(_layers(batch_stats), _NORM_STATS) if batch_stats else {}


def unpack_batch_stats(packed: Tree) -> Tree:
    """The documented ``batch_stats`` of a packed head; the inverse of `pack_batch_stats`."""
    if not packed:
        return {}
    return {
        layer_name(i + 1): {"norm": {name: packed[key][i] for key, name in _NORM_STATS.items()}}
        for i in range(packed["norm_mean"].shape[0])
    }


def _layers(tree: Tree) -> list[Tree]:
    return [tree[layer_name(i)] for i in range(1, len(tree) + 1) if layer_name(i) in tree]


def _stack(layers: list[Tree], names: dict[str, str]) -> dict[str, jax.Array]:
    return {key: jnp.stack([layer["norm"][name] for layer in layers]) for key, name in names.items()}
