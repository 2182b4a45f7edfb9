"""EfficientNet-Lite, a light backbone for images of any kind."""

import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from pspinal_jax.environment import library_convolves
from pspinal_jax.layers import norm
from pspinal_jax.layers.conv import pointwise
from pspinal_jax.layers.depthwise import depthwise_conv, same_padding
from pspinal_jax.layers.linear import NormVariables, check_choice, check_images

EfficientNetName = Literal["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
EPSILON = 1e-3
"""Epsilon of batch norm, as in TensorFlow's EfficientNets."""
CAP = 6
"""Upper bound of ReLU6."""
NUM_FEATURES = 1280
MIN_SIDE = 32
"""Smallest side in pixels: five halvings leave 1."""


class Scale(NamedTuple):
    """One EfficientNet-Lite: factors of widths and of repeats, and the side of its images."""

    width: float
    depth: float
    image_size: int


SCALES: dict[str, Scale] = {
    "efficientnet_lite0": Scale(1.0, 1.0, 224),
    "efficientnet_lite1": Scale(1.0, 1.1, 240),
    "efficientnet_lite2": Scale(1.1, 1.2, 260),
}


class BlockConfig(NamedTuple):
    """An inverted bottleneck: depthwise kernel, stride, expansion, channels that come in and go out."""

    kernel: int
    stride: int
    expansion: int
    fan_in: int
    channels: int


_GROUPS = (
    # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""M. Tan and Q. Le, arXiv 1905.11946, table 1; Lite has no squeeze-and-excitation and scales neither stem nor top."""
_STEM_CHANNELS = 32


def block_configs(variant: str) -> list[BlockConfig]:
    """All blocks of `variant` in their order; the first and the last group are never repeated more."""
    check_choice("variant", variant, tuple(SCALES))
    scale, fan_in, blocks = SCALES[variant], _STEM_CHANNELS, []
    for number, (repeats, kernel, stride, expansion, channels) in enumerate(_GROUPS):
        inner = 0 < number < len(_GROUPS) - 1
        width = _round_channels(channels * scale.width)
        for repeat in range(math.ceil(repeats * scale.depth) if inner else repeats):
            blocks.append(BlockConfig(kernel, stride if repeat == 0 else 1, expansion, fan_in, width))
            fan_in = width
    return blocks


def _round_channels(channels: float, divisor: int = 8) -> int:
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def kernel_init(fan_out: int) -> nn.initializers.Initializer:
    """Normal with standard deviation sqrt(2 / fan_out)."""
    return nn.initializers.normal(math.sqrt(2.0 / fan_out))


class ConvNorm(nn.Module):
    """batch_norm(conv(x)) under TensorFlow's SAME padding; then ReLU6, if `relu`. `channels` None: depthwise."""

    channels: int | None
    kernel: int = 1
    stride: int = 1
    relu: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, I] -> [N, ceil(H / stride), ceil(W / stride), O], in the dtype of `inputs`."""
        width = self.channels or inputs.shape[-1]
        shape = (self.kernel, self.kernel, 1 if self.channels is None else inputs.shape[-1], width)
        fan_out = self.kernel**2 * (1 if self.channels is None else width)
        kernel = self.param("kernel", kernel_init(fan_out), shape, self.param_dtype)
        affine, running = NormVariables(width, self.param_dtype, name="norm")()
        old = (running["mean"].value, running["var"].value)
        if not train or self.is_initializing():
            if library_convolves():
                folded, shift = norm.fold(kernel, *old, affine["scale"], affine["bias"], EPSILON)
                outputs = (self._convolve(inputs, folded) + shift).astype(inputs.dtype)
            else:
                outputs = self._convolve(inputs, kernel)
                outputs = norm.normalize(outputs, *old, affine["scale"], affine["bias"], EPSILON)
            return jnp.clip(outputs, 0, CAP) if self.relu else outputs
        outputs = self._convolve(inputs, kernel)
        return norm.train_norm(self, outputs, affine, running, relu=self.relu, epsilon=EPSILON, cap=CAP)

    def _convolve(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        kernel = kernel.astype(inputs.dtype)
        if self.channels is None:
            return depthwise_conv(inputs, kernel, self.stride)
        if self.kernel == 1:
            return pointwise(inputs, kernel[0, 0], self.stride)
        padding = same_padding(inputs.shape[1:3], kernel.shape[:2], self.stride)
        strides, layout = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(inputs, kernel, strides, padding, dimension_numbers=layout)


class InvertedBottleneck(nn.Module):
    """project(depthwise(expand(x))), plus x where the shape stays. An expansion of 1 has no `expand`."""

    config: BlockConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, I] -> [N, ceil(H / stride), ceil(W / stride), O]."""
        config, dtype, maps = self.config, self.param_dtype, inputs
        if config.expansion > 1:
            maps = ConvNorm(config.fan_in * config.expansion, param_dtype=dtype, name="expand")(maps, train)
        maps = ConvNorm(None, config.kernel, config.stride, param_dtype=dtype, name="depthwise")(maps, train)
        maps = ConvNorm(config.channels, relu=False, param_dtype=dtype, name="project")(maps, train)
        return maps + inputs if config.stride == 1 and config.fan_in == config.channels else maps


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite without its classifier: images of 32x32 and more to 1,280 features.

    M. Tan and Q. Le, arXiv 1905.11946, in the Lite form: ReLU6, no squeeze-and-excitation. Convolutions pad as
    TensorFlow's SAME does; batch norm has epsilon 1e-3 and keeps torch's running statistics (weight 0.9 on the old
    value, unbiased variance). The published weights expect (pixel - 127) / 128.

    Parameters: ``stem``, ``block_i/expand`` (but where the expansion is 1), ``block_i/depthwise``, ``block_i/project``
    and ``top``, each with ``kernel`` [K, K, I, O] ([K, K, 1, C] for depthwise), ``norm/scale`` and ``norm/bias``.
    ``batch_stats``: ``.../norm/mean`` and ``.../norm/var``.

    Attributes:
      variant: one of `SCALES`.
      dtype: dtype of computations and features; None for the wider of the images' and `param_dtype`. Batch norm
        always computes in float32 or wider.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: on an unknown variant, or images of another shape than [N, H, W, 3] with H and W at least 32.
      TypeError: if the images are not floating-point.
    """

    variant: EfficientNetName
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, tuple(SCALES))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Features [N, 1280] of floating-point images [N, H, W, 3].

        Args:
          images: [N, H, W, 3], H and W at least 32, normalised.
          train: True normalises with batch statistics and updates the running ones where ``batch_stats`` is mutable;
            False uses the running ones.
        """
        check_images(images, self.variant, MIN_SIDE)
        dtype, param_dtype = self.dtype or jnp.promote_types(images.dtype, self.param_dtype), self.param_dtype
        maps = ConvNorm(_STEM_CHANNELS, 3, 2, param_dtype=param_dtype, name="stem")(images.astype(dtype), train)
        for number, config in enumerate(block_configs(self.variant), start=1):
            maps = InvertedBottleneck(config, param_dtype, name=f"block_{number}")(maps, train)
        maps = ConvNorm(NUM_FEATURES, param_dtype=param_dtype, name="top")(maps, train)
        # Summed in float32: a mean of bfloat16 loses what the convolutions' sums kept.
        return jnp.mean(maps, (1, 2), dtype=jnp.promote_types(dtype, jnp.float32)).astype(dtype)
