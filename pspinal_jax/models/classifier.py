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
      mean: subtracted from images scaled to 0 .. 1.
      std: what they are divided by after that.
      dtype: dtype to compute in.
    """

    head: nn.Module
    backbone: nn.Module | None = None
    mean: float = 0.0
    std: float = 1.0
    dtype: Any = jnp.float32

    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """Logits [N, C] of images uint8 [N, H, W, C'], or of features [N, D], which are taken as they are."""
        if inputs.dtype == jnp.uint8:
            inputs = (inputs.astype(jnp.float32) / 255 - self.mean) / self.std
        inputs = inputs.astype(self.dtype)
        features = inputs.reshape(len(inputs), -1) if self.backbone is None else self.backbone(inputs, train)
        return self.head(features, train)
