"""A plain deep stack of layers, the contrast to heads whose layers see more than the one before."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.heads.declare import Linear, as_rows
from pspinal_jax.heads.initializers import Initializer
from pspinal_jax.heads.spec import Activation, layer_name
from pspinal_jax.heads.stacked import DropLinear


class PlainStack(nn.Module):
    """L layers one after the other: y_i = act(norm(W_i y_{i-1} + b_i)) with y_0 = x, logits = W_{L+1} y_L + b_{L+1}.

    No head of the package: the gradient reaches layer i through every later one. Attributes as of
    `pspinal_jax.ProgressiveSpinalHead`; parameters ``layer_1`` .. ``layer_L`` and ``output``.
    """

    num_classes: int
    layer_width: int
    num_layers: int
    norm: Literal["batch"] | None = None
    activation: Activation = nn.relu
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Logits [N, C] of floating-point features [N, D]."""
        hidden = as_rows(features, None, self.param_dtype)
        inits = (self.param_dtype, self.kernel_init, self.bias_init)
        layer = Linear(self.layer_width, self.norm == "batch", *inits)
        for index in range(1, self.num_layers + 1):
            hidden = DropLinear(layer, activation=self.activation, name=layer_name(index))(hidden, train)
        return DropLinear(Linear(self.num_classes, False, *inits), name="output")(hidden, train)
