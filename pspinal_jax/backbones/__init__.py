"""The backbones: from images [N, H, W, C] to features [N, D]. Only jax, flax and numpy are imported."""

from pspinal_jax.backbones.efficientnet import EfficientNetLite, EfficientNetName
from pspinal_jax.backbones.resnet import ResNet, ResNetName, num_features
from pspinal_jax.backbones.vgg5 import VGG5

__all__ = ["VGG5", "EfficientNetLite", "EfficientNetName", "ResNet", "ResNetName", "num_features"]
