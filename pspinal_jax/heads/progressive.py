"""The ProgressiveSpinalNet head as a linen module."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.heads.equation import HeadConfig, apply_unrolled, layer_name
from pspinal_jax.heads.fused import apply_fused
from pspinal_jax.heads.layouts import (
    NATIVE_LAYOUT,
    Implementation,
    check_shapes,
    choose,
    convert_batch_stats,
    convert_params,
    layout_of,
)
from pspinal_jax.heads.scan import apply_scan
from pspinal_jax.layers.dropout import Rate, drops
from pspinal_jax.layers.linear import (
    Activation,
    Initializer,
    Linear,
    LinearVariables,
    Norm,
    Tree,
    as_rows,
    check_choice,
    check_head,
    relu,
)
from pspinal_jax.layers.norm import check_mutable, check_rows


class ProgressiveSpinalHead(nn.Module):
    """A fully connected head in which every layer sees the features and the outputs of all earlier layers.

    With features x [..., D], L = `num_layers`, W = `layer_width`, C = `num_classes` (P. Chopra, "ProgressiveSpinalNet
    architecture for FC layers", arXiv 2103.11373, and its published scripts)::

        u      = dropout(x, dropout_rate)                    one mask, shared by all that see u
        y_1    = act(norm(W_1 x + b_1))                      layer 1 sees x itself
        y_i    = act(norm(W_i [u, y_1 .. y_{i-1}] + b_i))    i = 2 .. L
        logits = W_{L+1} [u, y_1 .. y_L] + b_{L+1}

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from pspinal_jax import ProgressiveSpinalHead
        >>> head = ProgressiveSpinalHead(num_classes=10, layer_width=128)
        >>> features = jnp.ones((64, 784))
        >>> variables = head.init(jax.random.key(0), features, train=False)
        >>> logits = head.apply(variables, features, train=True, rngs={'dropout': jax.random.key(1)})
        >>> logits.shape
        (64, 10)

    With ``norm='batch'``, training updates running statistics:
    ``logits, new = head.apply(variables, features, train=True, rngs=..., mutable=['batch_stats'])``.

    The variables form the same tree for every implementation::

        params       layer_i/kernel      [D + (i - 1) W, W]   i = 1 .. L; rows: the features, then y_1 .. y_{i-1}
                     layer_i/bias        [W]
                     layer_i/norm/scale  [W]                  with norm='batch', likewise layer_i/norm/bias
                     output/kernel       [D + L W, C]
                     output/bias         [C]
        batch_stats  layer_i/norm/mean   [W]                  with norm='batch', likewise layer_i/norm/var

    ``params`` have dtype `param_dtype`, and ``batch_stats`` the same, but at least float32. ``apply`` also takes the
    layouts made by `fuse_params`, or by `pack_params` and `pack_batch_stats`. A training loop can keep the variables in
    the layout of its implementation, which saves a copy of the parameters per step.

    Attributes:
      num_classes: C, number of logits.
      layer_width: W, width of each hidden layer.
      num_layers: L, number of hidden layers.
      dropout_rate: probability of dropping a feature in u, with one mask per forward pass. It may be a scalar
        floating-point array, also a traced one, and gives the same masks as the number: with
        ``head.clone(dropout_rate=rate)`` inside a jitted function, one program serves every rate.
      layer_dropout_rate: probability of dropping an entry of the whole input of a layer or of the output, drawn
        separately for each and in addition to u's mask (QMNIST script; layer 1 then sees its own dropout of x, not u).
      norm: None or 'none', or 'batch' for batch norm before the activation with torch's conventions (epsilon 1e-5,
        running averages with weight 0.9 on the old value, unbiased running variance).
      activation: elementwise function, ReLU by default.
      implementation: 'unrolled' computes the layers one after the other. 'fused' computes one matrix product for
        everything that reads the same input. It is fastest for few layers and batches of 32 or more with parameters in
        its layout (`fuse_params`); with the documented tree, which it copies at every call, it is slower than
        'unrolled'. 'scan' runs one lax.scan, whose program does not grow with L and whose backward pass stores one
        buffer [N, L W] (reverse-mode derivatives only; layout `pack_params`). 'auto' selects the implementation of the
        parameters' layout and, for the documented tree, 'unrolled' below 64 layers and 'scan' from there on. All give
        the same logits, gradients and statistics up to rounding, with the same masks from the same key.
      dtype: dtype of computations and logits; None for the wider of the features' and `param_dtype`. Batch norm always
        computes in float32 or wider.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the kernels; None for uniform in ±1/sqrt(fan_in), torch.nn.Linear's default.
      bias_init: initializer of the biases; None for torch.nn.Linear's default.

    Raises:
      ValueError: on an attribute outside its range, features without a last axis, packed or fused variables of another
        head, or a training batch of one row with batch norm.
      TypeError: if the features are not floating-point.
      flax.errors.ScopeParamShapeError: if the features have another D than the parameters.
      flax.errors.InvalidRngError: if dropout in training has no ``'dropout'`` key.
    """

    num_classes: int
    layer_width: int
    num_layers: int = 4
    dropout_rate: Rate = 0.2
    layer_dropout_rate: float = 0.0
    norm: Norm = None
    activation: Activation = relu
    implementation: Implementation = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    def __post_init__(self) -> None:
        check_head(self)
        check_choice("implementation", self.implementation, ("auto", *NATIVE_LAYOUT))
        super().__post_init__()

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Logits [..., C] of features [..., D].

        Args:
          features: floating-point array [..., D]; all axes except the last are batch axes.
          train: True draws dropout masks (from the ``'dropout'`` rng, which is needed only if a rate is above 0) and
            normalises with batch statistics; False drops nothing and uses the running statistics.

        Returns:
          Logits [..., C] in the dtype of computations.
        """
        rows = as_rows(features, self.dtype, self.param_dtype)
        if self.norm and train and not self.is_initializing():
            check_rows(features.shape)
            check_mutable(self)
        masks = train and (drops(self.dropout_rate) or self.layer_dropout_rate > 0.0)
        dropout_key = self.make_rng("dropout") if masks and not self.is_initializing() else None
        arguments: dict[str, Any] = {"train": train, "dropout_key": dropout_key}
        if self.has_variable("params", "first_kernel"):
            logits = self._apply_to_converted(rows, arguments)
        else:
            logits = self._apply_to_tree(rows, arguments)
        return logits.reshape(*features.shape[:-1], self.num_classes)

    @property
    def config(self) -> HeadConfig:
        """The head's configuration, as `apply_unrolled`, `apply_fused` and `apply_scan` take it."""
        return HeadConfig(
            num_classes=self.num_classes,
            layer_width=self.layer_width,
            num_layers=self.num_layers,
            dropout_rate=self.dropout_rate,
            layer_dropout_rate=self.layer_dropout_rate,
            batch_norm=self.norm == "batch",
            activation=self.activation,
        )

    def _apply_to_tree(self, features: jax.Array, arguments: dict[str, Any]) -> jax.Array:
        params: Tree = {}
        running: dict[str, dict[str, nn.Variable]] = {}
        for index in range(1, self.num_layers + 1):
            fan_in = features.shape[1] + (index - 1) * self.layer_width
            name = layer_name(index)
            params[name], running[name] = self._linear(fan_in, self.layer_width, self.norm == "batch", name)
        fan_in = features.shape[1] + self.num_layers * self.layer_width
        params["output"], _ = self._linear(fan_in, self.num_classes, False, "output")

        stats: Tree = {}
        if self.norm:
            stats = {
                name: {"norm": {key: variable.value for key, variable in variables.items()}}
                for name, variables in running.items()
            }
        logits, new_stats = self._run(params, stats, features, arguments)
        if arguments["train"] and not self.is_initializing():
            for name, layer in new_stats.items():
                for key, value in layer["norm"].items():
                    running[name][key].value = value
        return logits

    def _apply_to_converted(self, features: jax.Array, arguments: dict[str, Any]) -> jax.Array:
        """With variables that are packed or fused: linen declared none of them, so they are taken as they are."""
        params = dict(self.variables["params"])
        stats = dict(self.variables.get("batch_stats", {}))
        check_shapes(params, stats, features.shape[1], self.config)
        logits, new_stats = self._run(params, stats, features, arguments)
        if arguments["train"]:
            for name, value in new_stats.items():
                self.put_variable("batch_stats", name, value)
        return logits

    def _linear(self, fan_in: int, width: int, batch_norm: bool, name: str) -> tuple[Tree, dict[str, nn.Variable]]:
        linear = Linear(width, batch_norm, self.param_dtype, self.kernel_init, self.bias_init)
        return LinearVariables(fan_in, linear, name=name)()

    def _run(self, params: Tree, stats: Tree, features: jax.Array, arguments: dict[str, Any]) -> tuple[jax.Array, Tree]:
        """Logits, and new statistics in the layout that `stats` came in."""
        implementation = choose(self.implementation, layout_of(params), self.num_layers)
        apply = {"unrolled": apply_unrolled, "fused": apply_fused, "scan": apply_scan}[implementation]
        native = NATIVE_LAYOUT[implementation]
        logits, new_stats = apply(
            self.config, convert_params(params, native), convert_batch_stats(stats, native), features, **arguments
        )
        return logits, convert_batch_stats(new_stats, layout_of(params))
