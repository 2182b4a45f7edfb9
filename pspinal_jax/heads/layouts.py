"""The three forms of a head's variables, and the way from each to each: the documented tree, packed, fused."""

from typing import Literal

from flax.traverse_util import flatten_dict

from pspinal_jax.heads.equation import layer_name
from pspinal_jax.heads.fused import fuse_params, fused_shapes, is_fused, unfuse_params
from pspinal_jax.heads.scan import (
    is_packed,
    pack_batch_stats,
    pack_params,
    packed_shapes,
    unpack_batch_stats,
    unpack_params,
)
from pspinal_jax.layers.linear import Tree

Layout = Literal["tree", "packed", "fused"]
Implementation = Literal["auto", "unrolled", "fused", "scan"]
Computed = Literal["unrolled", "fused", "scan"]
NATIVE_LAYOUT: dict[Computed, Layout] = {"unrolled": "tree", "fused": "fused", "scan": "packed"}
"""The form that each implementation computes with; in the others it is converted first, at the price of a copy."""


DEEP = 64
"""Layers from which on compiling them one by one takes longer than it gains (`benchmark depth`)."""
WIDE_BATCH = 32
"""Rows from which on the fused form is used: measured slower than unrolled at 16 rows and faster at 64 (`benchmark
head`), so the crossing lies somewhere between."""


def choose(implementation: Implementation, form: Layout, num_layers: int) -> Computed:
    """What 'auto' stands for: the implementation whose form the parameters have; the tree is every depth's own."""
    if implementation != "auto":
        return implementation
    if form == "tree":
        return "scan" if num_layers >= DEEP else "unrolled"
    return "scan" if form == "packed" else "fused"


def training_layout(implementation: Implementation, num_layers: int, rows: int, masks_layers: bool) -> Layout:
    """The form that a training loop had best keep a head's parameters in.

    Args:
      implementation: the head's.
      num_layers: its number of hidden layers.
      rows: batch size on each device.
      masks_layers: whether it has a dropout mask per layer, for which nothing can be fused.
    """
    if implementation != "auto":
        return NATIVE_LAYOUT[implementation]
    if num_layers >= DEEP:
        return "packed"
    return "fused" if rows >= WIDE_BATCH and not masks_layers else "tree"


def layout_of(params: Tree) -> Layout:
    """The form that a head's `params` are in."""
    if is_packed(params):
        return "packed"
    return "fused" if is_fused(params) else "tree"


def convert_params(params: Tree, form: Layout) -> Tree:
    """A head's parameters (or gradients, or momenta) in the given form, whichever they come in."""
    found = layout_of(params)
    if found == form:
        return params
    if found == "packed":
        params = unpack_params(params)
    elif found == "fused":
        params = unfuse_params(params)
    if form == "packed":
        return pack_params(params)
    return fuse_params(params) if form == "fused" else params


def convert_batch_stats(batch_stats: Tree, form: Layout) -> Tree:
    """A head's running statistics in the given form, whichever they come in; {} stays {}."""
    packed = "norm_mean" in batch_stats
    if packed == (form == "packed"):
        return batch_stats
    return unpack_batch_stats(batch_stats) if packed else pack_batch_stats(batch_stats)


def check_shapes(
    params: Tree, batch_stats: Tree, num_features: int, width: int, num_layers: int, num_classes: int, batch_norm: bool
) -> None:
    """Raise ValueError, naming what is wrong, unless packed or fused variables fit a head of these sizes."""
    sizes = (num_features, width, num_layers, num_classes, batch_norm)
    form = layout_of(params)
    if form == "packed":
        shapes = packed_shapes(*sizes)
        expected = {**shapes["params"], **shapes["batch_stats"]}
        params = {**params, **batch_stats}
    else:
        # Fused running statistics are the documented tree's: one entry a layer.
        running = {
            f"{layer_name(i)}/norm/{name}": (width,) for i in range(1, num_layers + 1) for name in ("mean", "var")
        }
        expected = fused_shapes(*sizes) | (running if batch_norm else {})
        params = {**params, **flatten_dict(batch_stats, sep="/")}
    found = {name: getattr(params.get(name), "shape", None) for name in expected}
    wrong = [f"{name} is {found[name]}, expected {shape}" for name, shape in expected.items() if found[name] != shape]
    wrong += [f"{name} does not belong there" for name in params if name not in expected]
    if wrong:
        raise ValueError(f"{form} variables do not fit this head: {'; '.join(wrong)}")
