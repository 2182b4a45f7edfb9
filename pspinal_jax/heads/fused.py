"""The head with one matrix product for all that read the same input: L + 2 products, none of them narrow.

Every layer and the output read u, so one product serves them all; likewise every later layer and the output read y_j.
The sums that a layer is still waiting for travel along as columns of one array, from which each layer takes its own
when its turn comes: forward substitution with a block-triangular matrix.

The fused layout, and what it holds of the documented tree (layer_i/kernel [D + (i-1) W, W] for i = 1 .. L,
output/kernel [D + L W, C], biases, norms):

  first_kernel              [D, W]            layer 1, which sees x
  features_kernel           [D, (L-1) W + C]  what layers 2 .. L, and then the output, make of u
  hidden_kernel_j, j=1..L   [W, (L-j) W + C]  what layers j+1 .. L, and then the output, make of y_j
  bias                      [L W + C]         the layers' biases, then the output's
  norm_scale, norm_bias     [L W]             the layers' norm/scale, norm/bias

Running statistics stay in their tree. Nothing is padded, so both layouts hold the same numbers, and an optimiser that
works entry by entry does the same to both.
"""

import jax
import jax.numpy as jnp

from pspinal_jax.heads.equation import NORM_PARAMS, HeadConfig, apply_unrolled, batch_norm, layer_name, read_layers
from pspinal_jax.layers.dropout import dropout
from pspinal_jax.layers.linear import Tree, product


def hidden_name(index: int) -> str:
    """Name of the kernel that reads y_index, counted from 1."""
    return f"hidden_kernel_{index}"


def is_fused(params: Tree) -> bool:
    """Whether `params` is the fused layout rather than the documented tree."""
    return hidden_name(1) in params


def fuse_params(params: Tree) -> Tree:
    """The fused layout of a head's parameters.

    Args:
      params: the documented tree of one head, or a tree of the same structure (gradients, momenta).

    Returns:
      The fused layout (see the table at the top of this module); `unfuse_params` undoes it exactly.

    Raises:
      ValueError: if `params` is not such a tree.
    """
    layers, output = read_layers(params, "fuse_params")
    readers = [*layers, output]
    num_features, width = layers[0]["kernel"].shape

    def reading(start: int, stop: int, first: int) -> jax.Array:
        return jnp.concatenate([reader["kernel"][start:stop] for reader in readers[first:]], axis=1)

    fused = {
        "first_kernel": layers[0]["kernel"],
        "features_kernel": reading(0, num_features, 1),
        "bias": jnp.concatenate([reader["bias"] for reader in readers]),
    }
    for index in range(1, len(layers) + 1):
        stop = num_features + index * width
        fused[hidden_name(index)] = reading(stop - width, stop, index)
    if "norm" in layers[0]:
        for key, name in NORM_PARAMS.items():
            fused[key] = jnp.concatenate([layer["norm"][name] for layer in layers])
    return fused


def unfuse_params(fused: Tree) -> Tree:
    """The documented tree of a fused head; the inverse of `fuse_params`.

    Raises:
      ValueError: if `fused` is not in the fused layout.
    """
    if not is_fused(fused) or "first_kernel" not in fused:
        raise ValueError(f"unfuse_params expects what fuse_params returns, got {', '.join(sorted(fused))}")
    num_layers = sum(name.startswith("hidden_kernel_") for name in fused)
    width = fused["first_kernel"].shape[1]
    ends = [width * index for index in range(num_layers + 1)]
    ends.append(len(fused["bias"]))

    def columns(name: str, first: int, reader: int) -> jax.Array:
        """What `reader` (0 .. L) makes of the input of kernel `name`, whose first reader is `first`."""
        offset = ends[first]
        return fused[name][:, ends[reader] - offset : ends[reader + 1] - offset]

    params: Tree = {}
    for reader in range(num_layers + 1):
        of_features = columns("features_kernel", 1, reader) if reader else fused["first_kernel"]
        of_hidden = [columns(hidden_name(index), index, reader) for index in range(1, reader + 1)]
        layer: Tree = {
            "kernel": jnp.concatenate([of_features, *of_hidden]),
            "bias": fused["bias"][ends[reader] : ends[reader + 1]],
        }
        if reader < num_layers and "norm_scale" in fused:
            span = slice(ends[reader], ends[reader + 1])
            layer["norm"] = {name: fused[key][span] for key, name in NORM_PARAMS.items()}
        params[layer_name(reader + 1) if reader < num_layers else "output"] = layer
    return params


def apply_fused(
    config: HeadConfig,
    fused: Tree,
    batch_stats: Tree,
    features: jax.Array,
    *,
    train: bool,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, Tree]:
    """Logits of the head; arguments and results as in `apply_unrolled`, but the parameters fused.

    With a mask per layer (`layer_dropout_rate`) no two layers read the same input; `apply_unrolled` does that.
    """
    if dropout_key is not None and config.layer_dropout_rate > 0.0:
        return apply_unrolled(config, unfuse_params(fused), batch_stats, features, train=train, dropout_key=dropout_key)
    width = config.layer_width
    bias = fused["bias"].astype(features.dtype)
    dropped = dropout(dropout_key, config.dropout_rate, features)
    hidden = product(features, fused["first_kernel"]) + bias[None, :width]
    waiting = product(dropped, fused["features_kernel"]) + bias[None, width:]
    new_stats: Tree = {}
    for index in range(1, config.num_layers + 1):
        if config.batch_norm:
            name, span = layer_name(index), slice((index - 1) * width, index * width)
            affine = {"scale": fused["norm_scale"][span], "bias": fused["norm_bias"][span]}
            hidden, running = batch_norm(hidden, affine, batch_stats[name]["norm"], train=train)
            new_stats[name] = {"norm": running}
        waiting = waiting + product(config.activation(hidden), fused[hidden_name(index)])
        if index < config.num_layers:
            hidden, waiting = waiting[:, :width], waiting[:, width:]
    return waiting, new_stats
