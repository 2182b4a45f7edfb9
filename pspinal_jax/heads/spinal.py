"""SpinalNet's head, the baseline that ProgressiveSpinalNet set out to improve."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.heads.declare import Linear, as_rows, check_choice, check_count, check_rate
from pspinal_jax.heads.initializers import Initializer
from pspinal_jax.heads.spec import Activation, layer_name
from pspinal_jax.heads.stacked import DropLinear


class SpinalHead(nn.Module):
    """SpinalNet's head (arXiv 2007.03347): half of the features and the previous layer's output at each layer.

    With the features [..., D] split into a (the first D // 2) and b (the rest)::

        y_1 = layer(a),  y_2 = layer([b, y_1]),  y_3 = layer([a, y_2]),  y_4 = layer([b, y_3]), ...
        logits = W dropout([y_1 .. y_L]) + bias          layer(z) = act(norm(W dropout(z) + bias))

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from pspinal_jax import SpinalHead
        >>> head = SpinalHead(num_classes=10, layer_width=128, norm='batch', dropout_rate=0.5)
        >>> variables = head.init(jax.random.key(0), jnp.ones((2, 256)), train=False)
        >>> head.apply(variables, jnp.ones((2, 256)), train=False).shape
        (2, 10)

    Parameters: ``layer_1`` .. ``layer_L`` and ``output``, each ``kernel`` [fan_in, width] and ``bias``; with batch norm
    also ``layer_i/norm``.

    Attributes:
      num_classes: C, number of logits.
      layer_width: W, width of each hidden layer.
      num_layers: L, number of hidden layers.
      dropout_rate: probability of dropping an input of a layer or of the output, a fresh mask each.
      norm: None, or 'batch' for batch norm with torch's conventions before the activation.
      activation: elementwise function, ReLU by default.
      dtype: dtype to compute in; None for the wider of the features' and `param_dtype`.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the kernels; None for uniform in ±1/sqrt(fan_in), torch.nn.Linear's default.
      bias_init: initializer of the biases; None for the same.

    Raises:
      ValueError: on an attribute outside its range, fewer than two features, or a training batch of one row with batch
        norm.
      TypeError: if the features are not floating-point.
    """

    num_classes: int
    layer_width: int
    num_layers: int = 4
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
        check_count("num_layers", self.num_layers)
        check_rate("dropout_rate", self.dropout_rate)
        check_choice("norm", self.norm, (None, "batch"))
        super().__post_init__()

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Logits [..., C] of floating-point features [..., D]; `train` draws dropout from the 'dropout' rng."""
        rows = as_rows(features, self.dtype, self.param_dtype)
        if rows.shape[1] < 2:
            raise ValueError(f"SpinalHead splits the features in two, got shape {features.shape}")
        halves = jnp.split(rows, [rows.shape[1] // 2], axis=1)
        inits = (self.param_dtype, self.kernel_init, self.bias_init)
        layer = Linear(self.layer_width, self.norm == "batch", *inits)
        output = Linear(self.num_classes, False, *inits)
        outputs: list[jax.Array] = []
        for index in range(1, self.num_layers + 1):
            inputs = jnp.concatenate([halves[(index - 1) % 2], *outputs[-1:]], axis=1)
            module = DropLinear(layer, self.dropout_rate, self.activation, name=layer_name(index))
            outputs.append(module(inputs, train))
        hidden = jnp.concatenate(outputs, axis=1)
        logits = DropLinear(output, self.dropout_rate, name="output")(hidden, train)
        return logits.reshape(*features.shape[:-1], self.num_classes)
