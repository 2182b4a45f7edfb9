"""The baselines: SpinalNet's head, on which ProgressiveSpinalNet builds, an MLP with one hidden layer, a linear layer.

A layer is dropout, linear, norm and activation, in the order of the published scripts.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.heads.equation import batch_norm, layer_name, linear
from pspinal_jax.layers.dropout import Rate, dropout, drops
from pspinal_jax.layers.linear import (
    Activation,
    Initializer,
    Linear,
    Norm,
    as_rows,
    check_head,
    declare_linear,
    joined,
    relu,
)
from pspinal_jax.layers.norm import check_mutable, check_rows


class DropLinear(nn.Module):
    """act(norm(W dropout(x) + b)) on rows [N, D] -> [N, width]; activation None for none."""

    linear: Linear
    dropout_rate: Rate = 0.0
    activation: Activation | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """The layer's output [N, width] for `inputs` [N, D], in their dtype."""
        params, running = declare_linear(self, inputs.shape[1], self.linear)
        live = train and not self.is_initializing()
        key = self.make_rng("dropout") if live and drops(self.dropout_rate) else None
        outputs = linear(dropout(key, self.dropout_rate, inputs), params)
        if self.linear.batch_norm:
            if live:
                check_rows(inputs.shape)
                check_mutable(self)
            values = {name: variable.value for name, variable in running.items()}
            outputs, values = batch_norm(outputs, params["norm"], values, train=train)
            if live:
                for name, value in values.items():
                    running[name].value = value
        return outputs if self.activation is None else self.activation(outputs)


class SpinalHead(nn.Module):
    """SpinalNet's head (arXiv 2007.03347), in which each layer sees half of the features and the previous output.

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
      dropout_rate: probability of dropping an input of a layer or of the output, with separate masks. It may be a
        scalar array, see `ProgressiveSpinalHead`.
      norm: None or 'none', or 'batch' for batch norm with torch's conventions before the activation.
      activation: elementwise function, ReLU by default.
      dtype: dtype of computations; None for the wider of the features' and `param_dtype`.
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
    dropout_rate: Rate = 0.2
    norm: Norm = None
    activation: Activation = relu
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    def __post_init__(self) -> None:
        check_head(self)
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
            inputs = joined([halves[(index - 1) % 2], *outputs[-1:]], axis=1)
            module = DropLinear(layer, self.dropout_rate, self.activation, name=layer_name(index))
            outputs.append(module(inputs, train))
        hidden = jnp.concatenate(outputs, axis=1)
        logits = DropLinear(output, self.dropout_rate, name="output")(hidden, train)
        return logits.reshape(*features.shape[:-1], self.num_classes)


class MLPHead(nn.Module):
    """A head with one hidden layer: logits = W_2 dropout(act(norm(W_1 dropout(x) + b_1))) + b_2.

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
      layer_width: width of the hidden layer. `matching_width` computes the width for a number of parameters.
      dropout_rate: probability of dropping an input of either layer in training. It may be a scalar array, see
        `ProgressiveSpinalHead`.
      norm: None or 'none', or 'batch' for batch norm with torch's conventions before the activation.
      activation: elementwise function, ReLU by default.
      dtype: dtype of computations; None for the wider of the features' and `param_dtype`.
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
    dropout_rate: Rate = 0.2
    norm: Norm = None
    activation: Activation = relu
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    def __post_init__(self) -> None:
        check_head(self)
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
    """The hidden width, at least 1, for which an `MLPHead` is closest to `num_parameters` trainable parameters."""
    per_unit = num_features + 1 + num_classes + (2 if batch_norm else 0)
    return max(1, round((num_parameters - num_classes) / per_unit))


class DenseHead(nn.Module):
    """A linear classifier, the smallest baseline: logits = W dropout(x) + b.

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from pspinal_jax import DenseHead
        >>> head = DenseHead(num_classes=10)
        >>> variables = head.init(jax.random.key(0), jnp.ones((2, 784)), train=False)
        >>> head.apply(variables, jnp.ones((2, 784)), train=False).shape
        (2, 10)

    Parameters: ``output/kernel`` [D, C] and ``output/bias`` [C].

    Attributes:
      num_classes: C, number of logits.
      dropout_rate: probability of dropping a feature in training; a scalar array too, see `ProgressiveSpinalHead`.
      dtype: dtype of computations; None for the wider of the features' and `param_dtype`.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the kernel; None for uniform in ±1/sqrt(D), torch.nn.Linear's default.
      bias_init: initializer of the bias; None for the same.

    Raises:
      ValueError: on an attribute outside its range, or features without a last axis.
      TypeError: if the features are not floating-point.
    """

    num_classes: int
    dropout_rate: Rate = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    def __post_init__(self) -> None:
        check_head(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Logits [..., C] of floating-point features [..., D]; `train` draws dropout from the 'dropout' rng."""
        rows = as_rows(features, self.dtype, self.param_dtype)
        output = Linear(self.num_classes, False, self.param_dtype, self.kernel_init, self.bias_init)
        logits = DropLinear(output, self.dropout_rate, name="output")(rows, train)
        return logits.reshape(*features.shape[:-1], self.num_classes)
