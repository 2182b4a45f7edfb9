"""Taking over a linen head's variables: in the documented tree, and only if they fit."""

from typing import Any

import jax
from flax.traverse_util import flatten_dict

from pspinal_jax.files import differences
from pspinal_jax.heads.layouts import convert_batch_stats, convert_params
from pspinal_jax.layers.linear import Tree


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
    found, wanted = (
        {name: list(leaf.shape) for name, leaf in flatten_dict(tree, sep="/").items()} for tree in (given, expected)
    )
    if wrong := differences(found, wanted, _difference):
        raise ValueError(f"{collection} do not fit this head: {'; '.join(wrong)}")
    return jax.tree.map(lambda new, old: jax.numpy.asarray(new, old.dtype), given, expected)


def _difference(name: str, found: list[int] | None, wanted: list[int] | None) -> str:
    told = "missing" if found is None else found
    return f"{name} is {told}, expected {'nothing of that name' if wanted is None else wanted}"
