"""The published scripts' classifiers in PyTorch, with the names that their state dicts have. A helper, not a test."""

import torch
from torch import nn
from torch_resnet import TorchResNet

VGG5_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (256, 256, 256))


class Head(nn.Module):
    """fc_spinal_layer1 .. 4 and fc_out, each an nn.Sequential; in evaluation mode u = x."""

    def __init__(self, features, width, classes, batch_norm=False, layer_dropout=False):
        super().__init__()

        def sequential(fan_in, out, hidden):
            modules = [nn.Dropout(0.5)] if layer_dropout else []
            modules += [nn.Linear(fan_in, out)]
            modules += [nn.BatchNorm1d(out)] if batch_norm and hidden else []
            return nn.Sequential(*modules, *([nn.ReLU()] if hidden else []))

        for index in range(4):
            setattr(self, f"fc_spinal_layer{index + 1}", sequential(features + index * width, width, True))
        self.fc_out = sequential(features + 4 * width, classes, False)

    def head(self, features):
        seen = features
        for index in range(1, 5):
            seen = torch.cat([seen, getattr(self, f"fc_spinal_layer{index}")(seen)], dim=1)
        return self.fc_out(seen)

    def forward(self, features):
        return self.head(features.flatten(1))


class VGG5Classifier(Head):
    """Stages l1 .. l4 of convolution, batch norm, ReLU and at the end a pool, and the head beside them."""

    def __init__(self, width, classes, **options):
        super().__init__(256, width, classes, **options)
        fan_in = 1
        for stage, channels in enumerate(VGG5_CHANNELS, start=1):
            modules = []
            for out in channels:
                modules += [nn.Conv2d(fan_in, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
                fan_in = out
            setattr(self, f"l{stage}", nn.Sequential(*modules, nn.MaxPool2d(2, 2)))

    def forward(self, images):
        for stage in range(1, 5):
            images = getattr(self, f"l{stage}")(images)
        return self.head(images.flatten(1))


def resnet_classifier(depth, width, classes):
    """A ResNet whose fc is the head."""
    return TorchResNet(depth, fc=lambda features: Head(features, width, classes))
