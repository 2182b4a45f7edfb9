"""How much gradient arrives: at the features, at each layer's pre-activation, at each kernel.

`PlainStack` is the contrast: a deep stack whose layers see the layer before and nothing else.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pspinal_jax.heads.baselines import DropLinear
from pspinal_jax.heads.equation import layer_name
from pspinal_jax.layers.linear import Activation, Initializer, Linear, Tree, as_rows


def gradient_norms(head: nn.Module, variables: Tree, features: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Norms of the gradient of the cross-entropy loss, in training mode without dropout.

    Args:
      head: a head of this package without dropout, or a `PlainStack`; a progressive one with
        ``implementation='unrolled'``, for every layer's activation is called on its own.
      variables: of the head.
      features: float32 [N, D].
      labels: int32 [N].

    Returns:
      features: scalar, root mean square over the examples of the norm of d loss_n / d x_n.
      pre_activations: [L], the same of d loss_n / d z_i, z_i what layer i's activation takes (after batch norm).
      kernels: [L + 1], Frobenius norm of d mean loss / d kernel, layers 1 .. L and the output.
      loss: scalar, mean loss in nats.
      Without batch norm, loss_n depends on example n alone; with it, d loss_n stands for d sum of all losses.
    """
    num_layers = getattr(head, "num_layers", 0)
    rows = features.shape[0]
    probes = [jnp.zeros((rows, head.layer_width), features.dtype) for _ in range(num_layers)]

    def summed_loss(params: Tree, features: jax.Array, probes: list[jax.Array]) -> jax.Array:
        probed, seen = _with_probes(head, probes)
        given = {**variables, "params": params}
        logits, _ = probed.apply(given, features, train=True, mutable=["batch_stats"])
        if len(seen) != num_layers:
            raise RuntimeError(f"{len(seen)} activations were called in {num_layers} layers")
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    loss, grads = jax.value_and_grad(summed_loss, argnums=(0, 1, 2))(variables["params"], features, probes)
    of_params, of_features, of_probes = grads
    names = [*(layer_name(i + 1) for i in range(num_layers)), "output"]
    return {
        "features": root_mean_square_norm(of_features),
        "pre_activations": jnp.array([root_mean_square_norm(grad) for grad in of_probes]),
        "kernels": jnp.array([root_mean_square_norm(of_params[name]["kernel"].reshape(1, -1)) for name in names])
        / rows,
        "loss": loss / rows,
    }


def root_mean_square_norm(rows: jax.Array) -> jax.Array:
    """Root mean square of the norms of `rows` [N, K], exact also where the squares would underflow."""
    largest = jnp.max(jnp.abs(rows))
    scaled = rows / jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.mean(jnp.sum(jnp.square(scaled), axis=1)))


def _with_probes(head: Any, probes: list[jax.Array]) -> tuple[nn.Module, list[int]]:
    """`head` with probe i added to what layer i's activation takes, and a list that grows by one at every call."""
    seen: list[int] = []
    if not probes:
        return head, seen

    def activation(values: jax.Array) -> jax.Array:
        seen.append(len(seen))
        return head.activation(values + probes[seen[-1]])

    return head.clone(activation=activation), seen


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
