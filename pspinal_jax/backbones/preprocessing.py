"""Image size, mean and std that each backbone expects."""

from typing import NamedTuple

from pspinal_jax.backbones.efficientnet import SCALES
from pspinal_jax.backbones.resnet import VARIANTS


class Preprocessing(NamedTuple):
    """Preprocessing that the backbone's published weights were trained with.

    Attributes:
      mean: subtracted from images scaled to 0 .. 1; a number, or one a channel.
      std: divides them after that.
      image_size: side in pixels of its square images; None where it has none of its own.
    """

    mean: float | tuple[float, float, float] = 0.0
    std: float | tuple[float, float, float] = 1.0
    image_size: int | None = None


_IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)
"""Preprocessing of torchvision's ImageNet models."""


def default_preprocessing(backbone: str) -> Preprocessing:
    """The preprocessing of the backbone of that name; scaling to 0 .. 1 alone for 'none' and 'vgg5'.

    EfficientNet-Lite's published weights expect (pixel - 127) / 128.
    """
    if backbone in SCALES:
        return Preprocessing(127 / 255, 128 / 255, SCALES[backbone].image_size)
    return _IMAGENET if backbone in VARIANTS else Preprocessing()
