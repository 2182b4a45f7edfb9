"""One layer of the baseline heads: dropout, linear, norm, activation, in the order of the published scripts."""

import flax.linen as nn
import jax

from pspinal_jax.heads.declare import Linear, declare_linear
from pspinal_jax.heads.dropout import dropout
from pspinal_jax.heads.norm import check_rows
from pspinal_jax.heads.spec import Activation
from pspinal_jax.heads.unrolled import batch_norm, linear


class DropLinear(nn.Module):
    """act(norm(W dropout(x) + b)) on rows [N, D] -> [N, width]; no activation where it is None."""

    linear: Linear
    dropout_rate: float = 0.0
    activation: Activation | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """The layer's output [N, width] for `inputs` [N, D], in their dtype."""
        params, running = declare_linear(self, inputs.shape[1], self.linear)
        live = train and not self.is_initializing()
        key = self.make_rng("dropout") if live and self.dropout_rate > 0.0 else None
        outputs = linear(dropout(key, self.dropout_rate, inputs), params)
        if self.linear.batch_norm:
            if live:
                check_rows(inputs.shape)
            values = {name: variable.value for name, variable in running.items()}
            outputs, values = batch_norm(outputs, params["norm"], values, train=train)
            if live and self.is_mutable_collection("batch_stats"):
                for name, value in values.items():
                    running[name].value = value
        return outputs if self.activation is None else self.activation(outputs)
