"""The progressive head as two pure functions for plain JAX, on which the other modules of this package are built."""

from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from pspinal_jax.heads.progressive import ProgressiveSpinalHead
from pspinal_jax.interop.linen import HeadOptions
from pspinal_jax.layers.dropout import drops
from pspinal_jax.layers.linear import Tree


class HeadFunctions(NamedTuple):
    """A head as ``init, apply``.

    Attributes:
      init: ``init(key, num_features) -> (params, batch_stats)`` draws the parameters for features [..., num_features];
        `batch_stats` is {} without batch norm.
      apply: ``apply(params, batch_stats, features, *, train, key=None) -> (logits, batch_stats)`` computes logits
        [..., C] of features [..., D] and the new running statistics; see `apply_head`.
    """

    init: Callable[..., tuple[Tree, Tree]]
    apply: Callable[..., tuple[jax.Array, Tree]]


def progressive_head(num_classes: int, layer_width: int, **options: Unpack[HeadOptions]) -> HeadFunctions:
    """A progressive head (arXiv 2103.11373; equations in `pspinal_jax.ProgressiveSpinalHead`) as pure functions.

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from pspinal_jax.interop.functional import progressive_head
        >>> init, apply = progressive_head(num_classes=10, layer_width=128, norm='batch')
        >>> params, batch_stats = init(jax.random.key(0), num_features=784)
        >>> features = jnp.ones((64, 784))
        >>> logits, batch_stats = apply(params, batch_stats, features, train=True, key=jax.random.key(1))
        >>> logits.shape
        (64, 10)

    `params` and `batch_stats` are nested dicts like the linen head's collections of those names. Variables of a linen
    head are used as ``apply(variables['params'], variables.get('batch_stats', {}), ...)``, and vice versa.

    Args:
      num_classes: C, number of logits.
      layer_width: W, width of each hidden layer.
      **options: see `HeadOptions`.

    Returns:
      ``init(key, num_features) -> (params, batch_stats)`` and
      ``apply(params, batch_stats, features, *, train, key=None) -> (logits, batch_stats)``. Both are pure.
      Differentiate ``apply`` in its first argument, and jit it with `train` static. `batch_stats` is {} without batch
      norm, and is returned unchanged unless `train`. `key` draws the dropout masks.

    Raises:
      ValueError: on an option outside its range; from `apply`, if dropout needs a key, the features have no last axis,
        or batch norm is trained on one row.
      TypeError: from `apply`, if the features are not floating-point.
    """
    head = ProgressiveSpinalHead(num_classes, layer_width, **options)

    def init(key: jax.Array, num_features: int) -> tuple[Tree, Tree]:
        return init_head(head, key, num_features)

    def apply(
        params: Tree, batch_stats: Tree, features: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        return apply_head(head, params, batch_stats, features, train=train, key=key)

    return HeadFunctions(init, apply)


def init_head(head: ProgressiveSpinalHead, key: jax.Array, num_features: int) -> tuple[Tree, Tree]:
    """Draw params and batch_stats of `head` for features [..., num_features], as ``head.init`` does from `key`.

    Raises:
      ValueError: if `num_features` is below 1.
    """
    features = jnp.zeros((1, num_features), head.param_dtype)
    variables = jax.jit(lambda key: head.init(key, features, train=False))(key)
    return variables["params"], variables.get("batch_stats", {})


def apply_head(
    head: ProgressiveSpinalHead,
    params: Tree,
    batch_stats: Tree,
    features: jax.Array,
    *,
    train: bool,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Tree]:
    """Logits of a linen head, and its new running statistics.

    Args:
      head: the head.
      params: its parameters, in any layout that the head takes.
      batch_stats: its running statistics; {} without batch norm.
      features: floating-point array [..., D].
      train: True draws dropout masks and normalises with batch statistics; False does neither.
      key: key of the dropout masks, which are those of ``head.apply(..., rngs={'dropout': key})``; needed in training
        if a rate is above 0.

    Returns:
      (logits [..., C], batch_stats).

    Raises:
      ValueError: if dropout needs a key and there is none.
    """
    rngs: dict[str, jax.Array] = {}
    if train and draws_masks(head):
        if key is None:
            raise ValueError("dropout in training needs a key, got None; pass one, or call the head for evaluation")
        rngs["dropout"] = key
    variables = {"params": params, "batch_stats": batch_stats}
    mutable = ["batch_stats"] if train else []
    logits, new = head.apply(variables, features, train=train, rngs=rngs, mutable=mutable)
    return logits, new.get("batch_stats", {}) if train else batch_stats


def draws_masks(head: ProgressiveSpinalHead) -> bool:
    """Whether `head` has dropout at all, and so needs a key in training."""
    return drops(head.dropout_rate) or head.layer_dropout_rate > 0.0
