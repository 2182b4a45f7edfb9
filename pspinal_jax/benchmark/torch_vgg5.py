"""VGG-5 in PyTorch, the peer that ours is compared with. Imports torch."""

from typing import Any

import numpy as np
import torch
from torch import nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (256, 256, 256))


class TorchVGG5(nn.Module):
    """Images [N, 1, 28, 28] to features [N, 256]; stages of 3x3 convolution, batch norm and ReLU, each then pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        fan_in = 1
        for widths in STAGES:
            layers = nn.ModuleList()
            for width in widths:
                layers.append(
                    nn.ModuleDict({"conv": nn.Conv2d(fan_in, width, 3, padding=1), "norm": nn.BatchNorm2d(width)})
                )
                fan_in = width
            self.stages.append(layers)

    def trace(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The features, and what leaves every ReLU and every pool, in NHWC."""
        seen = {}
        maps = images
        for s, layers in enumerate(self.stages, start=1):
            for i, layer in enumerate(layers, start=1):
                maps = torch.relu(layer["norm"](layer["conv"](maps)))
                seen[f"stage_{s}/conv_{i}"] = maps.permute(0, 2, 3, 1)
            maps = nn.functional.max_pool2d(maps, 2, 2)
            seen[f"stage_{s}"] = maps.permute(0, 2, 3, 1)
        return maps.flatten(1), seen

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features."""
        return self.trace(images)[0]

    def load(self, params: dict[str, Any]) -> None:
        """Take over the parameters of our `VGG5`."""
        for s, layers in enumerate(self.stages, start=1):
            for i, layer in enumerate(layers, start=1):
                tree = params[f"stage_{s}"][f"conv_{i}"]
                pairs = [
                    (layer["conv"].weight, np.asarray(tree["kernel"]).transpose(3, 2, 0, 1)),
                    (layer["conv"].bias, tree["bias"]),
                    (layer["norm"].weight, tree["norm"]["scale"]),
                    (layer["norm"].bias, tree["norm"]["bias"]),
                ]
                for tensor, array in pairs:
                    tensor.data.copy_(torch.from_numpy(np.array(array)))
