"""The head as one lax.scan over its layers: program size and compile time do not grow with their number.

The buffer [prefix, y_1 .. y_L] has its full width from the start and layer i writes its own slot; kernel rows of slots
not yet written are zero. What the layers make of the features is one product before the scan. Only with a mask per
layer (`layer_dropout_rate`) do the features have to stand in the buffer, as its prefix.

Differentiating the scan as it stands would store one copy of the buffer per layer. The rule below stores the
pre-activations only, which together are one buffer, and computes everything else again from them. It is a reverse-mode
rule: use `apply_unrolled` for forward-mode derivatives (jax.jvp, jax.jacfwd, jax.hessian).

The packed layout, and what it holds of the documented tree (layer_i/kernel [D + (i-1) W, W] for i = 1 .. L,
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

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pspinal_jax.heads.equation import NORM_PARAMS, HeadConfig, layer_name, read_layers
from pspinal_jax.layers import norm
from pspinal_jax.layers.dropout import dropout, dropout_scale
from pspinal_jax.layers.linear import Activation, Tree, explicit_sharding, joined, product, summed_as

_PARAMS = ("first_kernel", "features_kernel", "hidden_kernel", "output_kernel", "hidden_bias", "output_bias")
NORM_STATS = {"norm_mean": "mean", "norm_var": "var"}


def is_packed(params: Tree) -> bool:
    """Whether `params` is the packed layout rather than the documented tree."""
    return "hidden_kernel" in params


def pack_params(params: Tree) -> Tree:
    """The packed layout of a head's parameters.

    Args:
      params: the documented tree of one head, e.g. ``variables['params']`` of a `ProgressiveSpinalHead`.
        A tree of the same structure (gradients, momenta) packs as well.

    Returns:
      The packed layout (see the table at the top of this module); `unpack_params` undoes it exactly.

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
        packed |= _stack(layers, NORM_PARAMS)
    return packed


def unpack_params(packed: Tree) -> Tree:
    """The documented tree of a packed head; the inverse of `pack_params`.

    Raises:
      ValueError: if `packed` lacks one of the packed arrays.
    """
    missing = [name for name in _PARAMS if name not in packed]
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
            layer["norm"] = {name: packed[key][i] for key, name in NORM_PARAMS.items()}
        params[layer_name(i + 1)] = layer
    params["output"] = {
        "kernel": jnp.concatenate([packed["features_kernel"][:, split:], packed["output_kernel"]]),
        "bias": packed["output_bias"],
    }
    return params


def pack_batch_stats(batch_stats: Tree) -> Tree:
    """The packed layout of a head's ``batch_stats``: ``{'norm_mean': [L, W], 'norm_var': [L, W]}``, {} for {}."""
    return _stack(_layers(batch_stats), NORM_STATS) if batch_stats else {}


def unpack_batch_stats(packed: Tree) -> Tree:
    """The documented ``batch_stats`` of a packed head; the inverse of `pack_batch_stats`."""
    if not packed:
        return {}
    return {
        layer_name(i + 1): {"norm": {name: packed[key][i] for key, name in NORM_STATS.items()}}
        for i in range(packed["norm_mean"].shape[0])
    }


def _layers(tree: Tree) -> list[Tree]:
    return [tree[layer_name(i)] for i in range(1, len(tree) + 1) if layer_name(i) in tree]


def _stack(layers: list[Tree], names: dict[str, str]) -> dict[str, jax.Array]:
    return {key: jnp.stack([layer["norm"][name] for layer in layers]) for key, name in names.items()}


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the derivative rule must know at trace time."""

    activation: Activation
    batch_norm: bool
    train: bool
    mask_rate: float


class _Layers(NamedTuple):
    """Operands of the scan, with a leading axis of length L but for the key; `norm` and `key` may be empty."""

    kernels: jax.Array
    norm: Tree
    key: jax.Array | None


def apply_scan(
    config: HeadConfig,
    packed: Tree,
    packed_stats: Tree,
    features: jax.Array,
    *,
    train: bool,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, Tree]:
    """Logits of the head, by a scan over layers; arguments as in `apply_unrolled`, but packed.

    Returns:
      (logits [N, C], new packed batch statistics).
    """
    dtype = features.dtype
    split = (config.num_layers - 1) * config.layer_width
    cast = {name: array.astype(dtype) for name, array in packed.items() if not name.startswith("norm")}
    dropped = dropout(dropout_key, config.dropout_rate, features)
    key = dropout_key if config.layer_dropout_rate > 0.0 else None
    if key is None:
        of_features = product(dropped, cast["features_kernel"])
        prefix, offsets, kernels = _shared_inputs(config, cast, features, of_features)
    else:
        prefix, offsets, kernels = _masked_inputs(config, cast, features, dropped, key)

    norm_names = [name for name in packed if name.startswith("norm")]
    layer_norm = {name: packed[name] for name in norm_names}
    if not train:
        layer_norm |= packed_stats
    static = _Static(config.activation, config.batch_norm, train, config.layer_dropout_rate if key is not None else 0.0)
    buffer, statistics = _hidden(static, prefix, offsets, _Layers(kernels, layer_norm, key))

    if key is None:
        logits = of_features[:, split:] + product(buffer, cast["output_kernel"]) + cast["output_bias"][None]
    else:
        output_kernel = jnp.concatenate([cast["features_kernel"][:, split:], cast["output_kernel"]])
        logits = (
            product(buffer * _mask(static, key, config.num_layers, buffer), output_kernel) + cast["output_bias"][None]
        )
    if not (config.batch_norm and train):
        return logits, packed_stats
    mean, var = statistics
    new_mean, new_var = norm.update_running(
        packed_stats["norm_mean"], packed_stats["norm_var"], mean, var, len(features)
    )
    return logits, {"norm_mean": new_mean, "norm_var": new_var}


def _shared_inputs(
    config: HeadConfig, cast: Tree, features: jax.Array, of_features: jax.Array
) -> tuple[jax.Array, ...]:
    """(prefix, offsets, kernels) of the scan where all later layers read the same u: these are all its products."""
    later = _by_layer(config, of_features)
    offsets = joined([product(features, cast["first_kernel"])[None], later], axis=0) + cast["hidden_bias"][:, None]
    return features[:, :0], offsets, cast["hidden_kernel"]


def _masked_inputs(
    config: HeadConfig, cast: Tree, features: jax.Array, dropped: jax.Array, key: jax.Array
) -> tuple[jax.Array, ...]:
    """The same with a mask per layer: the features go through the scan, with kernels of the buffer's whole width."""
    (rows, num_features), width, later_layers = features.shape, config.layer_width, config.num_layers - 1
    whole = num_features + config.num_layers * width
    scale = dropout_scale(key, 1, config.layer_dropout_rate, (rows, whole), features.dtype)[:, :num_features]
    first = product(features * scale, cast["first_kernel"])[None]
    nothing = jnp.broadcast_to(lax.full_like(first, 0), (later_layers, rows, width))
    offsets = joined([first, nothing], axis=0)
    of_features = jnp.pad(_by_layer(config, cast["features_kernel"]), ((1, 0), (0, 0), (0, 0)))
    kernels = joined([of_features, cast["hidden_kernel"]], axis=1)
    return dropped, offsets + cast["hidden_bias"][:, None], kernels


def _by_layer(config: HeadConfig, columns: jax.Array) -> jax.Array:
    """The columns [N, (L-1) W + C] of layers 2 .. L, as [L-1, N, W]."""
    rows, later_layers, width = columns.shape[0], config.num_layers - 1, config.layer_width
    if not later_layers:  # JAX's rule for reshaping nothing fails on a mesh of Explicit axes
        return jnp.zeros((0, rows, width), columns.dtype)
    return columns[:, : later_layers * width].reshape(rows, later_layers, width).transpose(1, 0, 2)


def _finish_layer(static: _Static, pre: jax.Array, layer_norm: Tree) -> tuple[jax.Array, tuple]:
    """act(norm(pre)) of one layer, pre [N, W], and the batch statistics (mean, var) that it used, () without norm."""
    if not static.batch_norm:
        return static.activation(pre), ()
    if static.train:
        mean, var = norm.batch_statistics(pre)
    else:
        mean, var = layer_norm["norm_mean"], layer_norm["norm_var"]
    normalized = norm.normalize(pre, mean, var, layer_norm["norm_scale"], layer_norm["norm_bias"])
    return static.activation(normalized), (mean, var)


def _mask(static: _Static, key: jax.Array, index: jax.Array | int, buffer: jax.Array) -> jax.Array:
    """The scale of layer `index`, counted from 0, on the whole buffer."""
    rows, columns = buffer.shape
    return dropout_scale(key, index + 1, static.mask_rate, (rows, columns), buffer.dtype)


def _forward(
    static: _Static, prefix: jax.Array, offsets: jax.Array, layers: _Layers
) -> tuple[jax.Array, tuple, jax.Array]:
    """(buffer [N, P + L W], statistics ([L, W], [L, W]) or (), pre-activations [L, N, W])."""
    num_layers, rows, width = offsets.shape
    start = prefix.shape[1]
    # Zeros that lie as the offsets do, for meshes whose axes are Explicit.
    empty = lax.full_like(offsets, 0).transpose(1, 0, 2).reshape(rows, num_layers * width)
    buffer = joined([prefix, empty], axis=1)

    def step(buffer: jax.Array, layer: tuple) -> tuple[jax.Array, tuple]:
        index, offset, kernel, layer_norm = layer
        inputs = buffer if layers.key is None else buffer * _mask(static, layers.key, index, buffer)
        pre = offset + product(inputs, kernel)
        hidden, statistics = _finish_layer(static, pre, layer_norm)
        buffer = lax.dynamic_update_slice(buffer, hidden, (0, start + index * width))
        return buffer, (pre, statistics)

    buffer, (pre, statistics) = lax.scan(step, buffer, (jnp.arange(num_layers), offsets, layers.kernels, layers.norm))
    return buffer, statistics, pre


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hidden(static: _Static, prefix: jax.Array, offsets: jax.Array, layers: _Layers) -> tuple[jax.Array, tuple]:
    """All hidden layers.

    Args:
      static: how.
      prefix: [N, P] what every layer but the first sees beside the earlier layers; P may be 0.
      offsets: [L, N, W] what is added to each layer's product.
      layers: kernels [L, P + L W, W], norm parameters each [L, W], and the key of the masks, or None.

    Returns:
      The buffer [N, P + L W], and the batch statistics ([L, W], [L, W]) (no gradient flows through these), or ().
    """
    buffer, statistics, _ = _forward(static, prefix, offsets, layers)
    return buffer, statistics


def _hidden_fwd(static: _Static, prefix: jax.Array, offsets: jax.Array, layers: _Layers) -> tuple:
    buffer, statistics, pre = _forward(static, prefix, offsets, layers)
    return (buffer, statistics), (prefix, pre, layers)


def _hidden_bwd(static: _Static, residuals: tuple, cotangents: tuple) -> tuple:
    prefix, pre, layers = residuals
    num_layers, rows, width = pre.shape
    start = prefix.shape[1]
    # Rebuilding y from the pre-activations is elementwise work; keeping it would be a second buffer.
    hidden = jax.vmap(lambda z, n: _finish_layer(static, z, n)[0])(pre, layers.norm)
    buffer = joined([prefix, hidden.transpose(1, 0, 2).reshape(rows, num_layers * width)], axis=1)

    def step(grad_buffer: jax.Array, layer: tuple) -> tuple[jax.Array, tuple]:
        index, pre, kernel, layer_norm = layer
        grad_hidden = lax.dynamic_slice(grad_buffer, (0, start + index * width), (rows, width))
        _, pullback = jax.vjp(lambda z, n: _finish_layer(static, z, n)[0], pre, layer_norm)
        grad_pre, grad_norm = pullback(grad_hidden)
        grad_inputs = product(grad_pre, kernel.T)
        grad_kernel = None
        if layers.key is not None:
            scale = _mask(static, layers.key, index, buffer)
            grad_inputs = grad_inputs * scale
            grad_kernel = jnp.matmul((buffer * scale).T, grad_pre, out_sharding=explicit_sharding(kernel))
        return grad_buffer + grad_inputs, (grad_pre, grad_norm, grad_kernel)

    grad_buffer, (grad_offsets, grad_norm, grad_kernels) = lax.scan(
        step, cotangents[0], (jnp.arange(num_layers), pre, layers.kernels, layers.norm), reverse=True
    )
    if grad_kernels is None:  # the same buffer for every layer: one product for all of them
        sharding = explicit_sharding(layers.kernels)
        grad_kernels = jnp.einsum("np,lnw->lpw", buffer, grad_offsets, out_sharding=sharding)
    row = jnp.arange(buffer.shape[1])
    written = row[None] < start + width * jnp.arange(num_layers)[:, None]
    grad_kernels = jnp.where(written[:, :, None], grad_kernels, 0)
    grads = (grad_buffer[:, :start], grad_offsets, grad_kernels, grad_norm)
    primals = (prefix, pre, layers.kernels, layers.norm)
    grad_prefix, grad_offsets, grad_kernels, grad_norm = jax.tree.map(summed_as, grads, primals)
    return grad_prefix, grad_offsets, _Layers(grad_kernels, grad_norm, None)


_hidden.defvjp(_hidden_fwd, _hidden_bwd)
