"""The progressive head as a Haiku module. Needs dm-haiku (extra `haiku`)."""

from collections.abc import Mapping
from typing import Any, Unpack

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

try:
    import haiku as hk
except ImportError as error:
    raise ImportError(
        "pspinal_jax.interop.haiku needs dm-haiku, which is not installed; in the checkout: pip install '.[haiku]'"
    ) from error

from pspinal_jax.heads.progressive import ProgressiveSpinalHead as LinenHead
from pspinal_jax.interop.functional import apply_head, draws_masks, init_head
from pspinal_jax.interop.linen import HeadOptions, fitting_variables
from pspinal_jax.layers.linear import Tree


class ProgressiveSpinalHead(hk.Module):
    """The head of ProgressiveSpinalNet (arXiv 2103.11373; equations in `pspinal_jax.ProgressiveSpinalHead`).

    Used inside ``hk.transform_with_state``, as hk.BatchNorm is.

    Example::

        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> from pspinal_jax.interop.haiku import ProgressiveSpinalHead
        >>> def network(features, is_training):
        ...     return ProgressiveSpinalHead(num_classes=10, layer_width=128, norm='batch')(features, is_training)
        >>> network = hk.transform_with_state(network)
        >>> features = jnp.ones((64, 784))
        >>> params, state = network.init(jax.random.key(0), features, is_training=True)
        >>> logits, state = network.apply(params, state, jax.random.key(1), features, is_training=True)
        >>> logits.shape
        (64, 10)
        >>> params['progressive_spinal_head/layer_2']['kernel'].shape
        (912, 128)

    Parameters, below the module's name: ``layer_1`` .. ``layer_L`` with ``kernel`` [D + (i - 1) W, W] and ``bias`` [W];
    with batch norm, ``layer_i/norm`` with ``scale`` and ``bias`` [W]; ``output`` with ``kernel`` [D + L W, C] and
    ``bias`` [C]. State: ``layer_i/norm`` with ``mean`` and ``var`` [W].

    Attributes:
      head: the linen head that computes, with all hyper-parameters.
    """

    def __init__(
        self, num_classes: int, layer_width: int, *, name: str | None = None, **options: Unpack[HeadOptions]
    ) -> None:
        """Keep the hyper-parameters.

        Args:
          num_classes: C, number of logits.
          layer_width: W, width of each hidden layer.
          name: the module's name, ``progressive_spinal_head`` by default.
          **options: see `HeadOptions`.

        Raises:
          ValueError: on an argument outside its range.
        """
        super().__init__(name=name)
        self.head = LinenHead(num_classes, layer_width, **options)

    def __call__(self, features: jax.Array, is_training: bool) -> jax.Array:
        """Logits [..., C] of features [..., D]; in training, takes a key for dropout and updates the statistics.

        Args:
          features: floating-point array [..., D]; every axis but the last is batch.
          is_training: whether to draw dropout masks and normalise with batch statistics.

        Raises:
          ValueError: if the features have another size than the parameters, or batch norm is trained on one row.
          TypeError: if the features are not floating-point.
        """
        initialise, updater = hk.transparent_lift_with_state(self._initialise, allow_reuse=True)
        params, state = initialise(hk.next_rng_key() if hk.running_init() else None, features)
        train = is_training and not hk.running_init()
        key = hk.next_rng_key() if train and draws_masks(self.head) else None
        logits, new_stats = apply_head(self.head, _nest(params), _nest(state), features, train=train, key=key)
        updater.update(_flatten(new_stats))
        return logits

    def _initialise(self, key: jax.Array, features: jax.Array) -> tuple[Tree, Tree]:
        params, batch_stats = init_head(self.head, key, features.shape[-1])
        return _flatten(params), _flatten(batch_stats)


def load_linen(
    params: Mapping[str, Any], state: Mapping[str, Any], variables: Any, name: str = "progressive_spinal_head"
) -> tuple[Tree, Tree]:
    """`params` and `state` with the variables of a linen `pspinal_jax.ProgressiveSpinalHead` in the head's place.

    Args:
      params: parameters of the whole network.
      state: its state.
      variables: ``{'params': .., 'batch_stats': ..}`` as linen's init returns them, also packed or fused.
      name: full name of the head among the network's modules.

    Returns:
      (params, state) as new dicts.

    Raises:
      ValueError: if there is no such module, or the variables are those of another head; every difference is named.
    """
    new_params, new_stats = fitting_variables(variables, _below(params, name), _below(state, name, may_lack=True))
    return {**params, **_flatten(new_params, name)}, {**state, **_flatten(new_stats, name)}


def to_linen(params: Mapping[str, Any], state: Mapping[str, Any], name: str = "progressive_spinal_head") -> Tree:
    """The head's variables for linen's apply: ``{'params': .., 'batch_stats': ..}``.

    `batch_stats` is left out without batch norm, as linen's init does.

    Args:
      params: parameters of the whole network.
      state: its state.
      name: full name of the head among the network's modules.

    Raises:
      ValueError: if there is no such module.
    """
    batch_stats = _below(state, name, may_lack=True)
    return {"params": _below(params, name)} | ({"batch_stats": batch_stats} if batch_stats else {})


def _below(collection: Mapping[str, Any], name: str, may_lack: bool = False) -> Tree:
    """The nested dicts of the modules below `name`."""
    prefix = f"{name}/"
    found = {key.removeprefix(prefix): value for key, value in collection.items() if key.startswith(prefix)}
    if not found and not may_lack:
        raise ValueError(f"no module {name!r} in the parameters; there are: {', '.join(collection) or 'none'}")
    return _nest(found)


def _nest(collection: Mapping[str, Any]) -> Tree:
    """{'layer_1/norm': {'mean': a}} -> {'layer_1': {'norm': {'mean': a}}}."""
    leaves = {(*path.split("/"), name): leaf for path, entries in collection.items() for name, leaf in entries.items()}
    return unflatten_dict(leaves)


def _flatten(nested: Tree, prefix: str = "") -> Tree:
    """What `_nest` nests, the paths below `prefix`."""
    flat: Tree = {}
    for (*path, name), leaf in flatten_dict(nested).items():
        flat.setdefault("/".join([prefix, *path] if prefix else path), {})[name] = leaf
    return flat
