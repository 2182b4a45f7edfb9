"""The head as one lax.scan over its layers: program size and compile time do not grow with their number.

The buffer [prefix, y_1 .. y_L] has its full width from the start and layer i writes its own slot; kernel rows of slots
not yet written are zero. What the layers make of the features is one product before the scan. Only with a mask
per layer (`layer_dropout_rate`) do the features have to stand in the buffer, as its prefix.

Differentiating the scan as it stands would keep one copy of the buffer per layer. The rule below keeps the
pre-activations only, which together are one buffer, and rebuilds everything else from them; it is a reverse-mode
rule, so use the unrolled form for forward-mode derivatives (jax.jvp, jax.jacfwd, jax.hessian).
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pspinal_jax.heads import norm
from pspinal_jax.heads.dropout import dropout, keep_scale
from pspinal_jax.heads.spec import Activation, HeadSpec, Tree


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
    spec: HeadSpec,
    packed: Tree,
    packed_stats: Tree,
    features: jax.Array,
    *,
    train: bool,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, Tree]:
    """Logits of the head, by a scan over layers; arguments as in `apply_unrolled`, but packed (see packing.py).

    Returns:
      (logits [N, C], new packed batch statistics).
    """
    rows, num_features = features.shape
    dtype = features.dtype
    width, num_layers = spec.layer_width, spec.num_layers
    split = (num_layers - 1) * width
    cast = {name: array.astype(dtype) for name, array in packed.items() if not name.startswith("norm")}
    dropped = dropout(dropout_key, spec.dropout_rate, features)
    masks_layers = dropout_key is not None and spec.layer_dropout_rate > 0.0
    bias = cast["hidden_bias"][:, None]

    first_inputs = features
    if dropout_key is not None and masks_layers:
        full_width = num_features + num_layers * width
        scales = [
            keep_scale(dropout_key, stream, spec.layer_dropout_rate, (rows, full_width), dtype)
            for stream in (1, num_layers + 1)
        ]
        first_inputs = features * scales[0][:, :num_features]
    first = (first_inputs @ cast["first_kernel"])[None]

    if masks_layers:
        # A mask per layer: the features go through the scan, in the buffer, with kernels of its whole width.
        prefix = dropped
        offsets = jnp.concatenate([first, jnp.zeros((num_layers - 1, rows, width), dtype)]) + bias
        of_features = cast["features_kernel"][:, :split].reshape(num_features, num_layers - 1, width)
        of_features = jnp.pad(of_features.transpose(1, 0, 2), ((1, 0), (0, 0), (0, 0)))
        kernels = jnp.concatenate([of_features, cast["hidden_kernel"]], axis=1)
    else:
        prefix = features[:, :0]
        of_features = dropped @ cast["features_kernel"]
        later = of_features[:, :split].reshape(rows, num_layers - 1, width).transpose(1, 0, 2)
        offsets = jnp.concatenate([first, later]) + bias
        kernels = cast["hidden_kernel"]

    norm_names = [name for name in packed if name.startswith("norm")]
    layer_norm = {name: packed[name] for name in norm_names}
    if not train:
        layer_norm |= packed_stats
    static = _Static(spec.activation, spec.batch_norm, train, spec.layer_dropout_rate if masks_layers else 0.0)
    layers = _Layers(kernels, layer_norm, dropout_key if masks_layers else None)
    buffer, statistics = _hidden(static, prefix, offsets, layers)

    if masks_layers:
        output_kernel = jnp.concatenate([cast["features_kernel"][:, split:], cast["output_kernel"]])
        logits = (buffer * scales[1]) @ output_kernel + cast["output_bias"]
    else:
        logits = of_features[:, split:] + buffer @ cast["output_kernel"] + cast["output_bias"]
    if not (spec.batch_norm and train):
        return logits, packed_stats
    mean, var = statistics
    new_mean, new_var = norm.update_running(packed_stats["norm_mean"], packed_stats["norm_var"], mean, var, rows)
    return logits, {"norm_mean": new_mean, "norm_var": new_var}


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


def _mask(static: _Static, key: jax.Array, index: jax.Array, buffer: jax.Array) -> jax.Array:
    """The scale of layer `index`, counted from 0, on the whole buffer."""
    rows, columns = buffer.shape
    return keep_scale(key, index + 1, static.mask_rate, (rows, columns), buffer.dtype)


def _forward(
    static: _Static, prefix: jax.Array, offsets: jax.Array, layers: _Layers
) -> tuple[jax.Array, tuple, jax.Array]:
    """(buffer [N, P + L W], statistics ([L, W], [L, W]) or (), pre-activations [L, N, W])."""
    num_layers, rows, width = offsets.shape
    start = prefix.shape[1]
    buffer = jnp.concatenate([prefix, jnp.zeros((rows, num_layers * width), prefix.dtype)], axis=1)

    def step(buffer: jax.Array, layer: tuple) -> tuple[jax.Array, tuple]:
        index, offset, kernel, layer_norm = layer
        inputs = buffer if layers.key is None else buffer * _mask(static, layers.key, index, buffer)
        pre = offset + inputs @ kernel
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
    buffer = jnp.concatenate([prefix, hidden.transpose(1, 0, 2).reshape(rows, -1)], axis=1)

    def step(grad_buffer: jax.Array, layer: tuple) -> tuple[jax.Array, tuple]:
        index, pre, kernel, layer_norm = layer
        grad_hidden = lax.dynamic_slice(grad_buffer, (0, start + index * width), (rows, width))
        _, pullback = jax.vjp(lambda z, n: _finish_layer(static, z, n)[0], pre, layer_norm)
        grad_pre, grad_norm = pullback(grad_hidden)
        grad_inputs = grad_pre @ kernel.T
        grad_kernel = None
        if layers.key is not None:
            scale = _mask(static, layers.key, index, buffer)
            grad_inputs = grad_inputs * scale
            grad_kernel = (buffer * scale).T @ grad_pre
        return grad_buffer + grad_inputs, (grad_pre, grad_norm, grad_kernel)

    grad_buffer, (grad_offsets, grad_norm, grad_kernels) = lax.scan(
        step, cotangents[0], (jnp.arange(num_layers), pre, layers.kernels, layers.norm), reverse=True
    )
    if grad_kernels is None:  # the same buffer for every layer: one product for all of them
        grad_kernels = jnp.einsum("np,lnw->lpw", buffer, grad_offsets)
    row = jnp.arange(buffer.shape[1])
    written = row[None] < start + width * jnp.arange(num_layers)[:, None]
    grad_kernels = jnp.where(written[:, :, None], grad_kernels, 0)
    return grad_buffer[:, :start], grad_offsets, _Layers(grad_kernels, grad_norm, None)


_hidden.defvjp(_hidden_fwd, _hidden_bwd)
