"""VGG-5, the backbone of the paper's 28x28 recipes."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspinal_jax.layers import norm
from pspinal_jax.layers.conv import conv_same
from pspinal_jax.layers.linear import Initializer, NormVariables, check_floating, torch_linear_init
from pspinal_jax.layers.pooling import max_pool_2x2

STAGES = ((64, 64), (128, 128), (256, 256, 256), (256, 256, 256))
"""Output channels of each 3x3 convolution, by stage: the VGG-5 of the paper's KMNIST, QMNIST and EMNIST scripts."""

IMAGE_SHAPE = (28, 28, 1)
NUM_FEATURES = STAGES[-1][-1]


def kernel_init(channels: int) -> Initializer:
    """Normal with standard deviation sqrt(2 / (9 channels)), `channels` the OUTPUT channels of a 3x3 convolution."""
    return nn.initializers.normal(math.sqrt(2 / (9 * channels)))


class ConvNormRelu(nn.Module):
    """relu(batch_norm(conv3x3(x) + bias)), [N, H, W, I] -> [N, H, W, channels]."""

    channels: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """The layer's output, in the dtype of `inputs`; `train` normalises with, and learns, batch statistics."""
        fan_in = inputs.shape[-1]
        shape = (3, 3, fan_in, self.channels)
        kernel = self.param("kernel", kernel_init(self.channels), shape, self.param_dtype)
        # torch draws this bias from +-1/sqrt(fan_in), and the fan-in of a 3x3 convolution is 9 c_in.
        bias = self.param("bias", torch_linear_init(9 * fan_in), shape[3:], self.param_dtype)
        affine, running = NormVariables(self.channels, self.param_dtype, name="norm")()
        outputs = conv_same(inputs, kernel.astype(inputs.dtype))
        if not train or self.is_initializing():
            shifted = running["mean"].value - bias.astype(running["mean"].value.dtype)
            return nn.relu(norm.normalize(outputs, shifted, running["var"].value, affine["scale"], affine["bias"]))
        return norm.train_norm(self, outputs, affine, running, bias=bias)


class VGG5Stage(nn.Module):
    """Convolutions of the given `channels`, then 2x2 max pooling."""

    channels: tuple[int, ...]
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, I] -> [N, H // 2, W // 2, channels[-1]]."""
        for index, channels in enumerate(self.channels, start=1):
            inputs = ConvNormRelu(channels, self.param_dtype, name=f"conv_{index}")(inputs, train)
        return max_pool_2x2(inputs)


class VGG5(nn.Module):
    """Ten 3x3 convolutions in four stages, each with batch norm and ReLU: 28x28 grey images to 256 features.

    The backbone of the published KMNIST, QMNIST and EMNIST scripts (praveenchopra/ProgressiveSpinalNet, after
    SpinalNet's). 3,508,416 trainable parameters. Sides: 28, 14, 7, 3, 1.

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from pspinal_jax.backbones import VGG5
        >>> backbone = VGG5()
        >>> variables = backbone.init(jax.random.key(0), jnp.ones((2, 28, 28, 1)), train=False)
        >>> backbone.apply(variables, jnp.ones((2, 28, 28, 1)), train=False).shape
        (2, 256)

    Parameters: ``stage_s/conv_i`` with ``kernel`` [3, 3, I, O], ``bias`` [O], ``norm/scale`` and ``norm/bias`` [O];
    stages 1 to 4 have 2, 2, 3 and 3 convolutions. ``batch_stats``: ``stage_s/conv_i/norm/mean`` and ``.../var`` [O].
    Kernels are drawn from normal(0, sqrt(2 / (9 O))), biases from uniform +-1/sqrt(9 I), torch's default.

    Batch norm follows torch: epsilon 1e-5, weight 0.9 on the old running value, unbiased running variance.

    Attributes:
      dtype: dtype of computations and features; None for the wider of the images' and `param_dtype`. Batch norm
        always computes in float32 or wider.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: on images of another shape than [N, 28, 28, 1], or an empty batch in training.
      TypeError: if the images are not floating-point.
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Features [N, 256] of floating-point images [N, 28, 28, 1].

        Args:
          images: [N, 28, 28, 1], normalised (mean 0.1307, standard deviation 0.3081 in the recipes).
          train: True normalises with batch statistics and updates the running ones where ``batch_stats`` is mutable;
            False uses the running ones.
        """
        check_floating("images", images, "normalise them first")
        if images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
            raise ValueError(f"VGG5 takes images of shape [N, 28, 28, 1], got {images.shape}")
        # The last stage's maps have 3x3 entries, so that even one image makes a batch of 9 rows.
        if train and not self.is_initializing():
            norm.check_rows((images.shape[0] * 9, 1))
        dtype = self.dtype or jnp.promote_types(images.dtype, self.param_dtype)
        features = images.astype(dtype)
        for index, channels in enumerate(STAGES, start=1):
            features = VGG5Stage(channels, self.param_dtype, name=f"stage_{index}")(features, train)
        return features.reshape(features.shape[0], NUM_FEATURES)
