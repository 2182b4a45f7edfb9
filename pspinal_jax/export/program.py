"""From a model and its variables to a `jax.export.Exported` that holds them both."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export

from pspinal_jax.errors import RunError
from pspinal_jax.weights.variables import first_not_finite

PLATFORMS = ("cpu", "cuda", "tpu")
MAX_BYTES = 2**31 - 2**24
"""Of parameters: the format (flatbuffers) ends at 2 GiB, and the program itself takes some."""


def export_classifier(
    model: nn.Module,
    variables: dict[str, Any],
    input_shape: tuple[int, ...],
    input_dtype: Any,
    *,
    transposed: bool = False,
) -> export.Exported:
    """The program inputs -> probabilities of `model`, lowered for `PLATFORMS`, with its variables as constants.

    Args:
      model: called as ``model.apply(variables, inputs [N, ...], train=False) -> logits [N, C]``.
      variables: what it applies.
      input_shape: one example's shape; the batch size N is left open.
      input_dtype: their dtype.
      transposed: the model saw images with rows and columns swapped; the program takes them upright and swaps them.

    Returns:
      Its ``call`` takes one array of inputs and gives float32 [N, C], each row of sum 1.

    Raises:
      RunError: if the variables are too large for one file, or not finite.
    """
    # Host arrays: nothing of the devices that hold them enters the program.
    held = jax.device_get(variables)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    if size > MAX_BYTES:
        raise RunError(f"the parameters take {size / 1e9:.1f} GB; an export holds up to {MAX_BYTES / 1e9:.1f} GB")
    # A program cannot tell by itself: XLA's CPU compiler may make anything of a constant that is NaN.
    name = first_not_finite(held)
    if name is not None:
        raise RunError(f"the variables are not finite, {name} first; an export would give no probabilities")

    def probabilities(inputs: jax.Array) -> jax.Array:
        if transposed:
            inputs = inputs.swapaxes(1, 2)
        logits = model.apply(held, inputs, train=False)
        return jax.nn.softmax(logits.astype(jnp.float32))  # type: ignore[union-attr]

    batch = export.symbolic_shape("N")
    inputs = jax.ShapeDtypeStruct((*batch, *input_shape), input_dtype)
    return export.export(jax.jit(probabilities), platforms=PLATFORMS)(inputs)
