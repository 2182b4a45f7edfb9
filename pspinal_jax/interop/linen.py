"""Shared by the heads of other libraries: the keyword options, and a check of a linen head's variables."""

from typing import Any, Literal, TypedDict

import jax
from flax.traverse_util import flatten_dict

from pspinal_jax.files import differences
from pspinal_jax.heads.layouts import Implementation, convert_batch_stats, convert_params
from pspinal_jax.layers.linear import Activation, Initializer, Tree


class HeadOptions(TypedDict, total=False):
    """The optional keywords, with the defaults of `pspinal_jax.ProgressiveSpinalHead`, whose docstring has the details.

    Attributes:
      num_layers: L, number of hidden layers; 4 by default.
      dropout_rate: probability of dropping a feature, one mask per forward pass; 0.2 by default.
      layer_dropout_rate: probability of dropping an entry of the whole input of a layer or of the output, drawn afresh
        for each; 0 by default.
      norm: None (the default) or 'none', or 'batch' for batch norm with torch's conventions before the activation.
      activation: elementwise function, ReLU by default.
      implementation: 'auto' (the default), 'unrolled', 'fused' or 'scan'; the same results up to rounding.
      dtype: dtype to compute in and of the logits; by default the wider of the features' and `param_dtype`.
      param_dtype: dtype of the parameters, float32 by default.
      kernel_init: initializer of the kernels; by default uniform in ±1/sqrt(fan_in), torch.nn.Linear's.
      bias_init: initializer of the biases; by default the same as torch.nn.Linear's.
    """

    num_layers: int
    dropout_rate: float
    layer_dropout_rate: float
    norm: Literal["batch", "none"] | None
    activation: Activation
    implementation: Implementation
    dtype: Any
    param_dtype: Any
    kernel_init: Initializer | None
    bias_init: Initializer | None


def fitting_variables(variables: Any, params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
    """The params and batch_stats of a linen head's `variables`, made to stand where these two stand.

    Args:
      variables: ``{'params': .., 'batch_stats': ..}`` of a linen head in any layout (tree, packed, fused).
      params: what they replace, in the documented tree.
      batch_stats: the same; {} without batch norm.

    Returns:
      (params, batch_stats) of the same structure, shapes and dtypes as the arguments.

    Raises:
      ValueError: if `variables` are those of another head; every difference is named.
    """
    if "params" not in variables:
        raise ValueError(
            f"variables have {', '.join(variables) or 'nothing'}, expected params, as linen's init returns"
        )
    given = convert_params(dict(variables["params"]), "tree")
    given_stats = convert_batch_stats(dict(variables.get("batch_stats", {})), "tree")
    return _fit("params", given, params), _fit("batch_stats", given_stats, batch_stats)


def _fit(collection: str, given: Tree, expected: Tree) -> Tree:
    found, needed = (
        {name: list(leaf.shape) for name, leaf in flatten_dict(tree, sep="/").items()} for tree in (given, expected)
    )
    if wrong := differences(found, needed, _difference):
        raise ValueError(f"{collection} do not fit this head: {'; '.join(wrong)}")
    return jax.tree.map(lambda new, old: jax.numpy.asarray(new, old.dtype), given, expected)


def _difference(name: str, found: list[int] | None, expected: list[int] | None) -> str:
    shape = "missing" if found is None else found
    return f"{name} is {shape}, expected {'nothing of that name' if expected is None else expected}"
