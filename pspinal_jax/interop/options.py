"""The keyword options of a progressive head, the same in every framework."""

from typing import Any, Literal, TypedDict

from pspinal_jax.heads.layouts import Implementation
from pspinal_jax.layers.linear import Activation, Initializer


class HeadOptions(TypedDict, total=False):
    """What may be left out, with the defaults of `pspinal_jax.ProgressiveSpinalHead`, whose docstring has the details.

    Attributes:
      num_layers: L, number of hidden layers; 4 by default.
      dropout_rate: probability of dropping a feature, one mask per forward pass; 0.2 by default.
      layer_dropout_rate: probability of dropping an entry of the whole input of a layer or of the output, drawn afresh
        for each; 0 by default.
      norm: None (the default), or 'batch' for batch norm with torch's conventions before the activation.
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
    norm: Literal["batch"] | None
    activation: Activation
    implementation: Implementation
    dtype: Any
    param_dtype: Any
    kernel_init: Initializer | None
    bias_init: Initializer | None
