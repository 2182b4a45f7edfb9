"""A backbone and a head as one linen module."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Classifier(nn.Module):
    """Logits of raw inputs: preprocessing, then the backbone's features, then the head.

    Attributes:
      head: a module called as ``head(features [N, D], train) -> logits [N, C]``.
      backbone: a module called as ``backbone(images, train) -> features [N, D]``, or None to flatten the inputs.
      mean: subtracted from images scaled to 0 .. 1; a number, or one a channel.
      std: what they are divided by after that.
      freeze_backbone: in training too the backbone normalises with its running statistics, which stay as they are,
        and no gradient reaches it.
      dtype: dtype to compute in.
    """

    head: nn.Module
    backbone: nn.Module | None = None
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    freeze_backbone: bool = False
    dtype: Any = jnp.float32

    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """Logits [N, C] of images uint8 [N, H, W, C'], or of features [N, D], which are taken as they are."""
        return self.head(self.features(inputs, train), train)

    def features(self, inputs: jax.Array, train: bool) -> jax.Array:
        """What the head sees of `inputs`: the backbone's features [N, D], or the flattened inputs."""
        if inputs.dtype == jnp.uint8:
            mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
            inputs = (inputs.astype(jnp.float32) / 255 - mean) / std
        inputs = inputs.astype(self.dtype)
        if self.backbone is None:
            return inputs.reshape(inputs.shape[0], -1)  # the batch may be symbolic, which len refuses
        if self.freeze_backbone:
            return jax.lax.stop_gradient(self.backbone(inputs, False))
        return self.backbone(inputs, train)
