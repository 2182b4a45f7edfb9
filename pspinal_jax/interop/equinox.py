"""The progressive head as an Equinox module. Needs Equinox (extra `equinox`)."""

from typing import Any, Unpack

import jax

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "pspinal_jax.interop.equinox needs Equinox, which is not installed; in the checkout: pip install '.[equinox]'"
    ) from error

from pspinal_jax.heads.progressive import ProgressiveSpinalHead as LinenHead
from pspinal_jax.interop.functional import apply_head, init_head
from pspinal_jax.interop.linen import HeadOptions, fitting_variables
from pspinal_jax.layers.linear import Tree


class ProgressiveSpinalHead(eqx.nn.StatefulLayer):
    """The head of ProgressiveSpinalNet (arXiv 2103.11373; equations in `pspinal_jax.ProgressiveSpinalHead`).

    Made with ``eqx.nn.make_with_state``, and called with a whole batch: no ``jax.vmap`` around it, for batch norm needs
    the batch, and the dropout masks of all rows come from one key. (Without batch norm, vmap over rows and keys works.)

    Example::

        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from pspinal_jax.interop.equinox import ProgressiveSpinalHead
        >>> make = eqx.nn.make_with_state(ProgressiveSpinalHead)
        >>> head, state = make(784, num_classes=10, layer_width=128, norm='batch', key=jax.random.key(0))
        >>> logits, state = head(jnp.ones((64, 784)), state, key=jax.random.key(1))
        >>> logits.shape
        (64, 10)

    Attributes:
      params: the leaves, nested dicts as in linen: ``layer_1`` .. ``layer_L`` with ``kernel`` [D + (i - 1) W, W],
        ``bias`` [W] and, with batch norm, ``norm/scale`` and ``norm/bias`` [W]; ``output`` with ``kernel``
        [D + L W, C] and ``bias`` [C].
      batch_stats: index of the running statistics in the state, a tree ``layer_i/norm/mean`` and ``.../var`` [W]; None
        without batch norm.
      inference: whether dropout is off and batch norm uses the running statistics; set by ``eqx.nn.inference_mode``.
      head: the linen head that computes, with all hyper-parameters (static).
    """

    params: Tree
    batch_stats: eqx.nn.StateIndex | None
    inference: bool
    head: LinenHead = eqx.field(static=True)

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        layer_width: int,
        *,
        key: jax.Array,
        inference: bool = False,
        **options: Unpack[HeadOptions],
    ) -> None:
        """Draw the parameters.

        Args:
          num_features: D, size of the features' last axis.
          num_classes: C, number of logits.
          layer_width: W, width of each hidden layer.
          key: key of the initial values.
          inference: whether to start in inference mode.
          **options: see `HeadOptions`.

        Raises:
          ValueError: on an argument outside its range.
        """
        self.head = LinenHead(num_classes, layer_width, **options)
        self.params, batch_stats = init_head(self.head, key, num_features)
        self.batch_stats = eqx.nn.StateIndex(batch_stats) if batch_stats else None
        self.inference = inference

    def __call__(
        self,
        x: jax.Array,
        state: eqx.nn.State,
        *,
        key: jax.Array | None = None,
        inference: bool | None = None,
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Logits of a batch, and the state after it.

        Args:
          x: features, a floating-point array [..., D]; every axis but the last is batch.
          state: as of ``eqx.nn.make_with_state``, of this head or of a model that it is part of.
          key: key of the dropout masks, needed in training where a rate is above 0.
          inference: in place of the attribute.

        Returns:
          (logits [..., C], state); the state has new running statistics in training with batch norm.

        Raises:
          ValueError: if the features have another size than `num_features`, dropout has no key, or batch norm is
            trained on one row (as under vmap).
          TypeError: if the features are not floating-point.
        """
        train = not (self.inference if inference is None else inference)
        logits, new_stats = apply_head(self.head, self.params, self._running(state), x, train=train, key=key)
        if train and self.batch_stats is not None:
            state = state.set(self.batch_stats, new_stats)
        return logits, state

    def _running(self, state: eqx.nn.State) -> Tree:
        return {} if self.batch_stats is None else state.get(self.batch_stats)


def load_linen(
    module: ProgressiveSpinalHead, state: eqx.nn.State, variables: Any
) -> tuple[ProgressiveSpinalHead, eqx.nn.State]:
    """`module` with the variables of a linen `pspinal_jax.ProgressiveSpinalHead`, and the state with its statistics.

    Args:
      module: the head.
      state: its state, or that of the model that it is part of (into which ``eqx.tree_at`` puts the new head).
      variables: ``{'params': .., 'batch_stats': ..}`` as linen's init returns them, also packed or fused.

    Returns:
      (module, state); with batch norm, the state passed in is used up, as by ``State.set``.

    Raises:
      ValueError: if the variables are those of another head; every difference is named.
    """
    params, batch_stats = fitting_variables(variables, module.params, module._running(state))
    if module.batch_stats is not None:
        state = state.set(module.batch_stats, batch_stats)
    return eqx.tree_at(lambda head: head.params, module, params), state


def to_linen(module: ProgressiveSpinalHead, state: eqx.nn.State) -> Tree:
    """The variables of `module` for ``module.head.apply``: ``{'params': .., 'batch_stats': ..}``.

    `batch_stats` is left out without batch norm, as linen's init does.
    """
    batch_stats = module._running(state)
    return {"params": module.params} | ({"batch_stats": batch_stats} if batch_stats else {})
