"""The residual block of the ResNet family, and the layer that it is made of."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.backbones.conv import conv_same
from pspinal_jax.backbones.norm_relu import batch_norm, norm_relu
from pspinal_jax.heads import norm
from pspinal_jax.heads.declare import NormVariables

kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal with standard deviation sqrt(2 / (K K' O)) for a kernel [K, K', I, O] (He et al., arXiv 1502.01852)."""


class Conv(NamedTuple):
    """A convolution: output channels, side of the kernel, stride."""

    channels: int
    side: int
    stride: int = 1


class ConvNorm(nn.Module):
    """batch_norm(conv(x)), the convolution without bias and with torch's padding; then ReLU, if `relu`."""

    conv: Conv
    relu: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, I] -> [N, ceil(H / stride), ceil(W / stride), channels], in the dtype of `inputs`."""
        channels, side, stride = self.conv
        kernel = self.param("kernel", kernel_init, (side, side, inputs.shape[-1], channels), self.param_dtype)
        affine, running = NormVariables(channels, self.param_dtype, name="norm")()
        outputs = conv_same(inputs, kernel.astype(inputs.dtype), stride)
        if not train or self.is_initializing():
            mean, variance = running["mean"].value, running["var"].value
            outputs = norm.normalize(outputs, mean, variance, affine["scale"], affine["bias"])
            return nn.relu(outputs) if self.relu else outputs
        normalised = norm_relu if self.relu else batch_norm
        outputs, mean, variance = normalised(outputs, affine["scale"], affine["bias"])
        if self.is_mutable_collection("batch_stats"):
            old = (running["mean"].value, running["var"].value)
            count = outputs.size // channels
            running["mean"].value, running["var"].value = norm.update_running(*old, mean, variance, count)
        return outputs


class ResidualBlock(nn.Module):
    """relu(f(x) + shortcut(x)): f is `convs`, with batch norm each and ReLU between them.

    The shortcut is x itself, or a 1x1 convolution with batch norm where f changes the shape.
    """

    convs: tuple[Conv, ...]
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, I] -> [N, ceil(H / s), ceil(W / s), O], s the product of the strides."""
        outputs, stride = inputs, 1
        for index, conv in enumerate(self.convs, start=1):
            last = index == len(self.convs)
            outputs = ConvNorm(conv, not last, self.param_dtype, name=f"conv_{index}")(outputs, train)
            stride *= conv.stride
        if stride > 1 or inputs.shape[-1] != outputs.shape[-1]:
            shortcut = Conv(outputs.shape[-1], 1, stride)
            inputs = ConvNorm(shortcut, False, self.param_dtype, name="shortcut")(inputs, train)
        return nn.relu(outputs + inputs)
