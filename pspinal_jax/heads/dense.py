"""The plainest head: one linear layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.heads.declare import Linear, as_rows, check_count, check_rate
from pspinal_jax.heads.initializers import Initializer
from pspinal_jax.heads.stacked import DropLinear


class DenseHead(nn.Module):
    """Linear classifier, the smallest baseline: logits = W dropout(x) + b.

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
      dropout_rate: probability of dropping a feature, in training.
      dtype: dtype to compute in; None for the wider of the features' and `param_dtype`.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the kernel; None for uniform in ±1/sqrt(D), torch.nn.Linear's default.
      bias_init: initializer of the bias; None for the same.

    Raises:
      ValueError: on an attribute outside its range, or features without a last axis.
      TypeError: if the features are not floating-point.
    """

    num_classes: int
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    def __post_init__(self) -> None:
        check_count("num_classes", self.num_classes)
        check_rate("dropout_rate", self.dropout_rate)
        super().__post_init__()

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Logits [..., C] of floating-point features [..., D]; `train` draws dropout from the 'dropout' rng."""
        rows = as_rows(features, self.dtype, self.param_dtype)
        output = Linear(self.num_classes, False, self.param_dtype, self.kernel_init, self.bias_init)
        logits = DropLinear(output, self.dropout_rate, name="output")(rows, train)
        return logits.reshape(*features.shape[:-1], self.num_classes)
