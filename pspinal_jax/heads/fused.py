"""The head with one matrix product for whatever shares an input: L + 2 products in all, none of them narrow.

Every layer and the output read u, so one product serves them all; likewise every later layer and the output read y_j.
The sums that a layer is still waiting for travel along as columns of one array, from which each layer takes its own
when its turn comes: forward substitution with a block-triangular matrix.
"""

import jax

from pspinal_jax.heads.dropout import dropout
from pspinal_jax.heads.fusing import hidden_name, unfuse_params
from pspinal_jax.heads.spec import HeadSpec, Tree, layer_name
from pspinal_jax.heads.unrolled import apply_unrolled, batch_norm


def apply_fused(
    spec: HeadSpec,
    fused: Tree,
    batch_stats: Tree,
    features: jax.Array,
    *,
    train: bool,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, Tree]:
    """Logits of the head; arguments and results as in `apply_unrolled`, but the parameters fused (see fusing.py).

    With a mask per layer (`layer_dropout_rate`) no two layers read the same input; the unrolled form does that.
    """
    if dropout_key is not None and spec.layer_dropout_rate > 0.0:
        return apply_unrolled(spec, unfuse_params(fused), batch_stats, features, train=train, dropout_key=dropout_key)
    width = spec.layer_width
    cast = {name: array.astype(features.dtype) for name, array in fused.items() if not name.startswith("norm")}
    dropped = dropout(dropout_key, spec.dropout_rate, features)
    hidden = features @ cast["first_kernel"] + cast["bias"][:width]
    waiting = dropped @ cast["features_kernel"] + cast["bias"][width:]
    new_stats: Tree = {}
    for index in range(1, spec.num_layers + 1):
        if spec.batch_norm:
            name, span = layer_name(index), slice((index - 1) * width, index * width)
            affine = {"scale": fused["norm_scale"][span], "bias": fused["norm_bias"][span]}
            hidden, running = batch_norm(hidden, affine, batch_stats[name]["norm"], train=train)
            new_stats[name] = {"norm": running}
        waiting = waiting + spec.activation(hidden) @ cast[hidden_name(index)]
        if index < spec.num_layers:
            hidden, waiting = waiting[:, :width], waiting[:, width:]
    return waiting, new_stats
