"""The layouts of a head's variables: the documented tree, packed, fused; which to use, and conversions between them."""

from typing import Any, Literal

from flax.traverse_util import flatten_dict

from pspinal_jax.heads.equation import NORM_PARAMS, HeadConfig, layer_name
from pspinal_jax.heads.fused import fuse_params, hidden_name, is_fused, unfuse_params
from pspinal_jax.heads.scan import (
    NORM_STATS,
    is_packed,
    pack_batch_stats,
    pack_params,
    unpack_batch_stats,
    unpack_params,
)
from pspinal_jax.layers.linear import Tree

Layout = Literal["tree", "packed", "fused"]
Implementation = Literal["auto", "unrolled", "fused", "scan"]
Computed = Literal["unrolled", "fused", "scan"]
NATIVE_LAYOUT: dict[Computed, Layout] = {"unrolled": "tree", "fused": "fused", "scan": "packed"}
"""The layout that each implementation computes with; in the others it is converted first, at the price of a copy."""


DEEP = 64
"""Layers from which on compiling them one by one takes longer than it gains (`benchmark depth`)."""
WIDE_BATCH = 32
"""Rows from which on the fused layout is used: measured slower than unrolled at 16 rows and faster at 64 (`benchmark
head`), so the crossing lies somewhere between."""


def choose(implementation: Implementation, layout: Layout, num_layers: int) -> Computed:
    """What 'auto' stands for: the implementation whose layout the parameters have; the tree is every depth's own."""
    if implementation != "auto":
        return implementation
    if layout == "tree":
        return "scan" if num_layers >= DEEP else "unrolled"
    return "scan" if layout == "packed" else "fused"


def training_layout(implementation: Implementation, num_layers: int, rows: int, masks_layers: bool) -> Layout:
    """The layout that a training loop had best hold a head's parameters in.

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
    """The layout that a head's `params` are in."""
    if is_packed(params):
        return "packed"
    return "fused" if is_fused(params) else "tree"


def convert_params(params: Tree, layout: Layout) -> Tree:
    """A head's parameters (or gradients, or momenta) in the given layout, whichever they come in."""
    found = layout_of(params)
    if found == layout:
        return params
    if found == "packed":
        params = unpack_params(params)
    elif found == "fused":
        params = unfuse_params(params)
    if layout == "packed":
        return pack_params(params)
    return fuse_params(params) if layout == "fused" else params


def convert_batch_stats(batch_stats: Tree, layout: Layout) -> Tree:
    """A head's running statistics in the given layout, whichever they come in; {} stays {}."""
    packed = "norm_mean" in batch_stats
    if packed == (layout == "packed"):
        return batch_stats
    return unpack_batch_stats(batch_stats) if packed else pack_batch_stats(batch_stats)


def check_shapes(params: Tree, batch_stats: Tree, num_features: int, config: HeadConfig) -> None:
    """Raise ValueError, naming what is wrong, unless packed or fused variables fit such a head.

    The shapes are written out: jax.eval_shape of `fuse_params` gives the same and takes 141 s for 1,000 layers.
    """
    layout, layers, width, classes = layout_of(params), config.num_layers, config.layer_width, config.num_classes
    hidden = layers * width
    expected: dict[str, Any] = {"first_kernel": (num_features, width)}
    expected |= {"features_kernel": (num_features, hidden - width + classes)}
    norms: dict[str, Any]
    if layout == "packed":
        expected |= {"hidden_kernel": (layers, hidden, width), "output_kernel": (hidden, classes)}
        expected |= {"hidden_bias": (layers, width), "output_bias": (classes,)}
        norms = dict.fromkeys([*NORM_PARAMS, *NORM_STATS], (layers, width))
    else:
        expected |= {hidden_name(i): (width, hidden - i * width + classes) for i in range(1, layers + 1)}
        expected |= {"bias": (hidden + classes,)}
        # Fused running statistics are the documented tree's: one entry a layer.
        running = [f"{layer_name(i)}/norm/{name}" for i in range(1, layers + 1) for name in ("mean", "var")]
        norms = dict.fromkeys(NORM_PARAMS, (hidden,)) | dict.fromkeys(running, (width,))
    expected |= norms if config.batch_norm else {}
    given = flatten_dict({**params, **batch_stats}, sep="/")
    found = {name: getattr(given.get(name), "shape", None) for name in expected}
    wrong = [f"{name} is {found[name]}, expected {shape}" for name, shape in expected.items() if found[name] != shape]
    wrong += [f"{name} does not belong there" for name in given if name not in expected]
    if wrong:
        raise ValueError(f"{layout} variables do not fit this head: {'; '.join(wrong)}")
