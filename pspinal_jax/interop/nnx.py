"""The progressive head as a flax.nnx module.

``nnx.bridge.ToNNX`` around the linen head wants a sample input and takes `train` at every call, so that
``model.train()`` and ``model.eval()`` pass it by. Here the linen head computes on an nnx module's own variables.
"""

from typing import Any, Unpack

import jax
from flax import nnx

from pspinal_jax.heads.equation import apply_unrolled
from pspinal_jax.heads.progressive import ProgressiveSpinalHead as LinenHead
from pspinal_jax.interop.functional import apply_head, draws_masks, init_head
from pspinal_jax.interop.linen import HeadOptions, fitting_variables
from pspinal_jax.layers.linear import Tree, as_rows


class ProgressiveSpinalHead(nnx.Module):
    """The head of ProgressiveSpinalNet (arXiv 2103.11373; equations in `pspinal_jax.ProgressiveSpinalHead`).

    Example::

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pspinal_jax.interop.nnx import ProgressiveSpinalHead
        >>> head = ProgressiveSpinalHead(784, num_classes=10, layer_width=128, norm='batch', rngs=nnx.Rngs(0))
        >>> head.train()
        >>> head(jnp.ones((64, 784))).shape
        (64, 10)
        >>> head.layer_2.kernel.shape
        (912, 128)

    Variables: ``layer_1`` .. ``layer_L`` with ``kernel`` [D + (i - 1) W, W], ``bias`` [W] and, with batch norm,
    ``norm``: ``scale``, ``bias``, ``mean`` and ``var`` [W]; ``output`` with ``kernel`` [D + L W, C] and ``bias`` [C].
    ``mean`` and ``var`` are nnx.BatchStat, the others nnx.Param.

    Attributes:
      head: the linen head that computes, with all hyper-parameters.
      deterministic: whether dropout is off; ``train()`` and ``eval()`` set it.
      use_running_average: whether batch norm uses, and leaves alone, the running statistics; ``train()`` and
        ``eval()`` set it.
      rngs: stream of the dropout keys, None without dropout.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        layer_width: int,
        *,
        rngs: nnx.Rngs,
        deterministic: bool = False,
        use_running_average: bool = False,
        **options: Unpack[HeadOptions],
    ) -> None:
        """Draw the parameters.

        Args:
          num_features: D, size of the features' last axis.
          num_classes: C, number of logits.
          layer_width: W, width of each hidden layer.
          rngs: its `params` stream initialises; of its `dropout` stream, a fork is stored.
          deterministic: whether to start with dropout off.
          use_running_average: whether to start with batch norm on running statistics.
          **options: see `HeadOptions`.

        Raises:
          ValueError: on an argument outside its range.
        """
        self.head = LinenHead(num_classes, layer_width, **options)
        self.deterministic = deterministic
        self.use_running_average = use_running_average
        params, batch_stats = init_head(self.head, rngs.params(), num_features)
        for name, layer in params.items():
            variables: dict[str, Any] = {key: nnx.Param(layer[key]) for key in ("kernel", "bias")}
            if "norm" in layer:
                norm = {key: nnx.Param(value) for key, value in layer["norm"].items()}
                running = {key: nnx.BatchStat(value) for key, value in batch_stats[name]["norm"].items()}
                variables["norm"] = nnx.Dict(norm | running)
            setattr(self, name, nnx.Dict(variables))
        self.rngs = rngs["dropout"].fork() if draws_masks(self.head) else nnx.data(None)

    def __call__(
        self,
        features: jax.Array,
        *,
        deterministic: bool | None = None,
        use_running_average: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Logits [..., C] of features [..., D]; in training, updates the running statistics in place.

        Args:
          features: floating-point array [..., D]; every axis but the last is batch.
          deterministic: in place of the attribute.
          use_running_average: in place of the attribute.
          rngs: in place of the attribute: a key, a stream, or an nnx.Rngs with a `dropout` stream.

        Raises:
          ValueError: if the features have another size than `num_features`, or batch norm is trained on one row.
          TypeError: if the features are not floating-point.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        running = self.use_running_average if use_running_average is None else use_running_average
        drops = draws_masks(self.head) and not deterministic
        updates = self.head.norm is not None and not running
        key = _dropout_key(self.rngs if rngs is None else rngs) if drops else None
        params, batch_stats = _collections(self)
        if drops and self.head.norm and running:
            return _drop_on_running_statistics(self.head, params, batch_stats, features, key)
        head = self.head if drops else self.head.clone(dropout_rate=0.0, layer_dropout_rate=0.0)
        logits, new_stats = apply_head(head, params, batch_stats, features, train=drops or updates, key=key)
        if updates:
            nnx.update(self, new_stats)
        return logits

    def set_view(self, deterministic: bool | None = None, use_running_average: bool | None = None) -> None:
        """What ``nnx.view`` calls: set the attributes that are not None."""
        if deterministic is not None:
            self.deterministic = deterministic
        if use_running_average is not None:
            self.use_running_average = use_running_average


def load_linen(module: ProgressiveSpinalHead, variables: Any) -> None:
    """Give `module` the variables of a linen `pspinal_jax.ProgressiveSpinalHead`, in place.

    Args:
      module: the head, alone or inside a larger module.
      variables: ``{'params': .., 'batch_stats': ..}`` as linen's init returns them, also packed or fused.

    Raises:
      ValueError: if they are those of another head; every difference is named.
    """
    params, batch_stats = fitting_variables(variables, *_collections(module))
    nnx.update(module, params)
    if batch_stats:
        nnx.update(module, batch_stats)


def to_linen(module: ProgressiveSpinalHead) -> Tree:
    """The variables of `module` for ``module.head.apply``: ``{'params': .., 'batch_stats': ..}``.

    `batch_stats` is left out without batch norm, as linen's init does.
    """
    params, batch_stats = _collections(module)
    return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})


def _collections(module: ProgressiveSpinalHead) -> tuple[Tree, Tree]:
    params, batch_stats = nnx.state(module, nnx.Param, nnx.BatchStat)
    return dict(nnx.to_pure_dict(params)), dict(nnx.to_pure_dict(batch_stats))


def _dropout_key(rngs: nnx.Rngs | nnx.RngStream | jax.Array | None) -> jax.Array:
    if rngs is None:
        raise ValueError("dropout needs rngs, got None; pass rngs= to the call, or set deterministic=True")
    if isinstance(rngs, nnx.Rngs):
        return rngs["dropout"]()
    return rngs() if isinstance(rngs, nnx.RngStream) else rngs


def _drop_on_running_statistics(
    head: LinenHead, params: Tree, batch_stats: Tree, features: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Fine-tuning with frozen statistics, for which the linen head has no switch."""
    rows = as_rows(features, head.dtype, head.param_dtype)
    logits, _ = apply_unrolled(head.config, params, batch_stats, rows, train=False, dropout_key=key)
    return logits.reshape(*features.shape[:-1], head.num_classes)
