"""The ResNet family, the backbones of the paper's colour images: the residual block, its layers, the whole network."""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.layers import norm
from pspinal_jax.layers.conv import conv_same
from pspinal_jax.layers.linear import NormVariables, check_choice, check_images
from pspinal_jax.layers.pooling import max_pool_3x3

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
        return norm.train_norm(self, outputs, affine, running, relu=self.relu)


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


ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "wide_resnet101_2"]


class Variant(NamedTuple):
    """What tells one ResNet from another.

    Attributes:
      depths: residual blocks of each of the four stages.
      expansion: output channels of a block over those of its stage (64, 128, 256, 512); above 1 for bottlenecks.
      width_factor: channels inside a bottleneck over those of its stage.
    """

    depths: tuple[int, int, int, int]
    expansion: int
    width_factor: int = 1


VARIANTS: dict[str, Variant] = {
    "resnet18": Variant((2, 2, 2, 2), 1),
    "resnet34": Variant((3, 4, 6, 3), 1),
    "resnet50": Variant((3, 4, 6, 3), 4),
    "resnet101": Variant((3, 4, 23, 3), 4),
    "wide_resnet50_2": Variant((3, 4, 6, 3), 4, 2),
    "wide_resnet101_2": Variant((3, 4, 23, 3), 4, 2),
}
"""K. He et al., arXiv 1512.03385, table 1; S. Zagoruyko and N. Komodakis, arXiv 1605.07146; names as torchvision's."""

STAGE_CHANNELS = (64, 128, 256, 512)
MIN_SIDE = 32
"""Every stage halves the sides, the last of five to 1."""


def num_features(variant: str) -> int:
    """Length of the feature vector: 512 for resnet18 and resnet34, 2048 for the others.

    Raises:
      ValueError: if there is no such variant.
    """
    check_choice("variant", variant, tuple(VARIANTS))
    return STAGE_CHANNELS[-1] * VARIANTS[variant].expansion


class ResNet(nn.Module):
    """Residual network without its classifier: images of any size from 32x32 to 512 or 2048 features.

    torchvision's networks, number for number: a 7x7 convolution, a 3x3 max pool, four stages of residual blocks, the
    mean over all positions. A bottleneck has its stride in the 3x3 convolution; convolutions and pool pad by
    (K - 1) / 2 on each side. `pspinal_jax.weights.resnet_variables` reads torch's parameters.

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from pspinal_jax.backbones import ResNet
        >>> backbone = ResNet('resnet18')
        >>> images = jnp.ones((2, 32, 32, 3))
        >>> init = lambda key: backbone.init_with_output(key, images, train=False)
        >>> features, variables = jax.jit(init)(jax.random.key(0))
        >>> features.shape
        (2, 512)

    Parameters: ``stem``, ``stage_s/block_j/conv_i`` and, in a block that changes the shape,
    ``stage_s/block_j/shortcut``, each with ``kernel`` [K, K, I, O], ``norm/scale`` and ``norm/bias`` [O].
    ``batch_stats``: ``.../norm/mean`` and ``.../norm/var`` [O]. Kernels are drawn from normal(0, sqrt(2 / (K K O))),
    torchvision's choice.

    Batch norm follows torch: epsilon 1e-5, weight 0.9 on the old running value, unbiased running variance.

    Attributes:
      variant: one of `VARIANTS`.
      dtype: dtype of computations and features; None for the wider of the images' and `param_dtype`. Batch norm
        always computes in float32 or wider.
      param_dtype: dtype of the parameters.
      remat: store each block's input alone for the backward pass and compute the block again there: less memory, more
        time. No effect on CPU, where XLA merges the second computation with the first (seen with jax 0.10.2).

    Raises:
      ValueError: on an unknown variant, images of another shape than [N, H, W, 3] with H and W at least 32, or a
        training batch in which batch norm sees a single position.
      TypeError: if the images are not floating-point.
    """

    variant: ResNetName
    dtype: Any = None
    param_dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, tuple(VARIANTS))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Features [N, 512] or [N, 2048] of floating-point images [N, H, W, 3].

        Args:
          images: [N, H, W, 3], H and W at least 32, normalised.
          train: True normalises with batch statistics and updates the running ones where ``batch_stats`` is mutable;
            False uses the running ones.
        """
        check_images(images, self.variant, MIN_SIDE)
        if train and not self.is_initializing():
            # The last maps have a 32nd of the sides.
            norm.check_rows((images.shape[0], -(-images.shape[1] // 32), -(-images.shape[2] // 32), 1))
        dtype = self.dtype or jnp.promote_types(images.dtype, self.param_dtype)
        maps = images.astype(dtype)
        maps = ConvNorm(Conv(64, 7, 2), True, self.param_dtype, name="stem")(maps, train)
        maps = max_pool_3x3(maps)
        for index in range(1, 5):
            maps = ResNetStage(self.variant, index, self.param_dtype, self.remat, name=f"stage_{index}")(maps, train)
        # Summed in float32: a mean of bfloat16 loses what the convolutions' sums held.
        return jnp.mean(maps, (1, 2), dtype=jnp.promote_types(dtype, jnp.float32)).astype(dtype)


class ResNetStage(nn.Module):
    """One of the four stages; the first block halves the sides, but for stage 1."""

    variant: str
    index: int
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, maps: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, I] -> [N, ceil(H / s), ceil(W / s), O], s being 1 for stage 1 and 2 for the others."""
        # `train` is argument 2, after the module itself; it chooses the program and is not an array.
        block = nn.remat(ResidualBlock, static_argnums=(2,)) if self.remat else ResidualBlock
        channels = STAGE_CHANNELS[self.index - 1]
        for number in range(1, VARIANTS[self.variant].depths[self.index - 1] + 1):
            stride = 2 if number == 1 and self.index > 1 else 1
            convs = block_convs(VARIANTS[self.variant], channels, stride)
            maps = block(convs, self.param_dtype, name=f"block_{number}")(maps, train)
        return maps


def block_convs(variant: Variant, channels: int, stride: int) -> tuple[Conv, ...]:
    """The convolutions of a block in a stage of `channels`."""
    if variant.expansion == 1:
        return (Conv(channels, 3, stride), Conv(channels, 3))
    width = channels * variant.width_factor
    return (Conv(width, 1), Conv(width, 3, stride), Conv(channels * variant.expansion, 1))
