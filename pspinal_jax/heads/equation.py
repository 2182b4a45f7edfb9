"""The paper's equation, layer by layer: the reference for every other implementation, on the documented tree.

`HeadConfig` says what to compute, apart from how; `read_layers` reads the tree strictly.
"""

import dataclasses

import jax
from flax.traverse_util import flatten_dict

from pspinal_jax.layers import norm
from pspinal_jax.layers.dropout import Rate, dropout, dropout_scale
from pspinal_jax.layers.linear import Activation, Tree, joined, product

NORM_PARAMS = {"norm_scale": "scale", "norm_bias": "bias"}
"""Batch norm's parameters: the name of a layout that holds all layers in one array -> the name in the tree."""


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Static description of a progressive head; see `ProgressiveSpinalHead` for the meaning of each field."""

    num_classes: int
    layer_width: int
    num_layers: int
    dropout_rate: Rate
    layer_dropout_rate: float
    batch_norm: bool
    activation: Activation


def apply_unrolled(
    config: HeadConfig,
    params: Tree,
    batch_stats: Tree,
    features: jax.Array,
    *,
    train: bool,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, Tree]:
    """Logits of the head, one product per layer.

    Args:
      config: what to compute.
      params: ``{'layer_1': {'kernel': [D, W], 'bias': [W], 'norm': {'scale': [W], 'bias': [W]}}, ..,
        'output': {'kernel': [D + L W, C], 'bias': [C]}}``, `norm` only where the config has batch norm.
      batch_stats: ``{'layer_1': {'norm': {'mean': [W], 'var': [W]}}, ..}`` or an empty dict.
      features: [N, D], of the dtype to compute in.
      train: whether batch norm uses and updates batch statistics.
      dropout_key: key of all masks, or None for no dropout at all.

    Returns:
      (logits [N, C], new batch statistics); the latter is `batch_stats` itself when not training.
    """
    rows, num_features = features.shape
    width = num_features + config.num_layers * config.layer_width

    def drop_layer_input(index: int, inputs: jax.Array) -> jax.Array:
        if dropout_key is None or config.layer_dropout_rate == 0.0:
            return inputs
        # Every layer draws the mask of the widest input and takes its own part, so that the scan,
        # whose buffer has that width from the start, sees the same one.
        scale = dropout_scale(dropout_key, index, config.layer_dropout_rate, (rows, width), inputs.dtype)
        return inputs * scale[:, : inputs.shape[1]]

    dropped = dropout(dropout_key, config.dropout_rate, features)
    outputs: list[jax.Array] = []
    new_stats: Tree = {}
    for index in range(1, config.num_layers + 1):
        layer = params[layer_name(index)]
        inputs = joined([dropped, *outputs], axis=-1) if index > 1 else features
        hidden = linear(drop_layer_input(index, inputs), layer)
        if config.batch_norm:
            running = batch_stats[layer_name(index)]["norm"]
            hidden, running = batch_norm(hidden, layer["norm"], running, train=train)
            new_stats[layer_name(index)] = {"norm": running}
        outputs.append(config.activation(hidden))
    inputs = joined([dropped, *outputs], axis=-1)
    logits = linear(drop_layer_input(config.num_layers + 1, inputs), params["output"])
    return logits, new_stats


def linear(inputs: jax.Array, layer: Tree) -> jax.Array:
    """Inputs [N, fan_in] times kernel [fan_in, width] plus bias, in the dtype of `inputs`."""
    return product(inputs, layer["kernel"]) + layer["bias"].astype(inputs.dtype)[None]


def batch_norm(inputs: jax.Array, affine: Tree, running: Tree, *, train: bool) -> tuple[jax.Array, Tree]:
    """Batch norm of `inputs` [N, W], and the running statistics after it."""
    if not train:
        outputs = norm.normalize(inputs, running["mean"], running["var"], affine["scale"], affine["bias"])
        return outputs, running
    mean, var = norm.batch_statistics(inputs)
    outputs = norm.normalize(inputs, mean, var, affine["scale"], affine["bias"])
    new_mean, new_var = norm.update_running(running["mean"], running["var"], mean, var, inputs.shape[0])
    return outputs, {"mean": new_mean, "var": new_var}


def layer_name(index: int) -> str:
    """Name of hidden layer `index`, counted from 1 as in the paper."""
    return f"layer_{index}"


def read_layers(params: Tree, caller: str) -> tuple[list[Tree], Tree]:
    """The entries of layer_1 .. layer_L, and of the output.

    Args:
      params: the documented tree, or one of the same structure (gradients, momenta).
      caller: who asks, for the message.

    Raises:
      ValueError: if `params` is not such a tree.
    """
    found = {name: getattr(leaf, "shape", None) for name, leaf in flatten_dict(params, sep="/").items()}
    num_features, width = found.get("layer_1/kernel") or (0, 0)
    _, num_classes = found.get("output/kernel") or (0, 0)
    names = [layer_name(i) for i in range(1, max(len(params), 2))]
    expected: dict[str, tuple[int, ...]] = {}
    for index, name in enumerate([*names, "output"]):
        fan_out = num_classes if name == "output" else width
        expected |= {f"{name}/kernel": (num_features + index * width, fan_out), f"{name}/bias": (fan_out,)}
        if name != "output" and "norm" in params.get(layer_name(1), {}):
            expected |= {f"{name}/norm/scale": (width,), f"{name}/norm/bias": (width,)}
    wrong = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(
            f"{caller} expects layer_1 .. layer_L and output, each with kernel and bias, of one progressive head; "
            f"wrong: {', '.join(wrong)}; pass the head's own entry of the params collection"
        )
    return [params[name] for name in names], params["output"]
