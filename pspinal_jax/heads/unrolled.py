"""The head written out layer by layer, as the paper's equation reads: the reference for every other form."""

import jax
import jax.numpy as jnp

from pspinal_jax.heads import norm
from pspinal_jax.heads.dropout import dropout, keep_scale
from pspinal_jax.heads.spec import HeadSpec, Tree, layer_name


def apply_unrolled(
    spec: HeadSpec,
    params: Tree,
    batch_stats: Tree,
    features: jax.Array,
    *,
    train: bool,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, Tree]:
    """Logits of the head, one product per layer.

    Args:
      spec: what to compute.
      params: ``{'layer_1': {'kernel': [D, W], 'bias': [W], 'norm': {'scale': [W], 'bias': [W]}}, ..,
        'output': {'kernel': [D + L W, C], 'bias': [C]}}``, `norm` only where the spec has batch norm.
      batch_stats: ``{'layer_1': {'norm': {'mean': [W], 'var': [W]}}, ..}`` or an empty dict.
      features: [N, D], of the dtype to compute in.
      train: whether batch norm uses and updates batch statistics.
      dropout_key: key of all masks, or None for no dropout at all.

    Returns:
      (logits [N, C], new batch statistics); the latter is `batch_stats` itself when not training.
    """
    rows, num_features = features.shape
    width = num_features + spec.num_layers * spec.layer_width

    def drop_layer_input(index: int, inputs: jax.Array) -> jax.Array:
        if dropout_key is None or spec.layer_dropout_rate == 0.0:
            return inputs
        # Every layer draws the mask of the widest input and cuts its own part, so that the scan form,
        # whose buffer has that width from the start, sees the same one.
        scale = keep_scale(dropout_key, index, spec.layer_dropout_rate, (rows, width), inputs.dtype)
        return inputs * scale[:, : inputs.shape[1]]

    dropped = dropout(dropout_key, spec.dropout_rate, features)
    outputs: list[jax.Array] = []
    new_stats: Tree = {}
    for index in range(1, spec.num_layers + 1):
        layer = params[layer_name(index)]
        inputs = jnp.concatenate([dropped, *outputs], axis=-1) if index > 1 else features
        hidden = linear(drop_layer_input(index, inputs), layer)
        if spec.batch_norm:
            running = batch_stats[layer_name(index)]["norm"]
            hidden, running = batch_norm(hidden, layer["norm"], running, train=train)
            new_stats[layer_name(index)] = {"norm": running}
        outputs.append(spec.activation(hidden))
    inputs = jnp.concatenate([dropped, *outputs], axis=-1)
    logits = linear(drop_layer_input(spec.num_layers + 1, inputs), params["output"])
    return logits, new_stats


def linear(inputs: jax.Array, layer: Tree) -> jax.Array:
    """Inputs [N, fan_in] times kernel [fan_in, width] plus bias, in the dtype of `inputs`."""
    return inputs @ layer["kernel"].astype(inputs.dtype) + layer["bias"].astype(inputs.dtype)


def batch_norm(inputs: jax.Array, affine: Tree, running: Tree, *, train: bool) -> tuple[jax.Array, Tree]:
    """Batch norm of `inputs` [N, W], and the running statistics after it."""
    if not train:
        outputs = norm.normalize(inputs, running["mean"], running["var"], affine["scale"], affine["bias"])
        return outputs, running
    mean, var = norm.batch_statistics(inputs)
    outputs = norm.normalize(inputs, mean, var, affine["scale"], affine["bias"])
    new_mean, new_var = norm.update_running(running["mean"], running["var"], mean, var, inputs.shape[0])
    return outputs, {"mean": new_mean, "var": new_var}
