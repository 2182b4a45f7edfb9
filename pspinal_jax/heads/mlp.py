"""The usual head: one hidden layer."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.heads.declare import Linear, as_rows, check_choice, check_count, check_rate
from pspinal_jax.heads.initializers import Initializer
from pspinal_jax.heads.spec import Activation
from pspinal_jax.heads.stacked import DropLinear


class MLPHead(nn.Module):
    """One hidden layer: logits = W_2 dropout(act(norm(W_1 dropout(x) + b_1))) + b_2.

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from pspinal_jax import MLPHead
        >>> head = MLPHead(num_classes=10, layer_width=640)
        >>> variables = head.init(jax.random.key(0), jnp.ones((2, 784)), train=False)
        >>> head.apply(variables, jnp.ones((2, 784)), train=False).shape
        (2, 10)

    Parameters: ``layer_1`` and ``output``, each ``kernel`` [fan_in, width] and ``bias``; with batch norm also
    ``layer_1/norm``.

    Attributes:
      num_classes: C, number of logits.
      layer_width: width of the hidden layer. `matching_width` gives the one that equals a progressive head in
        parameters.
      dropout_rate: probability of dropping an input of either layer, in training.
      norm: None, or 'batch' for batch norm with torch's conventions before the activation.
      activation: elementwise function, ReLU by default.
      dtype: dtype to compute in; None for the wider of the features' and `param_dtype`.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the kernels; None for uniform in ±1/sqrt(fan_in), torch.nn.Linear's default.
      bias_init: initializer of the biases; None for the same.

    Raises:
      ValueError: on an attribute outside its range, features without a last axis, or a training batch of one row with
        batch norm.
      TypeError: if the features are not floating-point.
    """

    num_classes: int
    layer_width: int
    dropout_rate: float = 0.2
    norm: Literal["batch"] | None = None
    activation: Activation = nn.relu
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    def __post_init__(self) -> None:
        check_count("num_classes", self.num_classes)
        check_count("layer_width", self.layer_width)
        check_rate("dropout_rate", self.dropout_rate)
        check_choice("norm", self.norm, (None, "batch"))
        super().__post_init__()

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Logits [..., C] of floating-point features [..., D]; `train` draws dropout from the 'dropout' rng."""
        rows = as_rows(features, self.dtype, self.param_dtype)
        inits = (self.param_dtype, self.kernel_init, self.bias_init)
        layer = Linear(self.layer_width, self.norm == "batch", *inits)
        output = Linear(self.num_classes, False, *inits)
        hidden = DropLinear(layer, self.dropout_rate, self.activation, name="layer_1")(rows, train)
        logits = DropLinear(output, self.dropout_rate, name="output")(hidden, train)
        return logits.reshape(*features.shape[:-1], self.num_classes)


def matching_width(num_parameters: int, num_features: int, num_classes: int, batch_norm: bool) -> int:
    """The hidden width at which an `MLPHead` comes closest to `num_parameters` trainable parameters, at least 1."""
    per_unit = num_features + 1 + num_classes + (2 if batch_norm else 0)
    return max(1, round((num_parameters - num_classes) / per_unit))
