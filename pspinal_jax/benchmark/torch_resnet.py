"""ResNets in PyTorch with torchvision's names for their tensors, peers that ours are compared with. Imports torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
VARIANTS = {"resnet18": (18, 1), "resnet50": (50, 1), "resnet101": (101, 1), "wide_resnet101_2": (101, 2)}
"""Depth and width factor by name."""


class Block(nn.Module):
    """relu(f(x) + x), or of downsample(x) where f changes the shape; f is two or three convolutions."""

    def __init__(self, fan_in: int, convs: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.count, width, total = len(convs), fan_in, 1
        for index, (channels, side, stride) in enumerate(convs, start=1):
            conv = nn.Conv2d(width, channels, side, stride, padding=side // 2, bias=False)
            setattr(self, f"conv{index}", conv)
            setattr(self, f"bn{index}", nn.BatchNorm2d(channels))
            width, total = channels, total * stride
        self.downsample = None
        if total > 1 or fan_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(fan_in, width, 1, total, bias=False), nn.BatchNorm2d(width))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """The block's maps."""
        y = maps
        for index in range(1, self.count + 1):
            y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            y = torch.relu(y) if index < self.count else y
        return torch.relu(y + (maps if self.downsample is None else self.downsample(maps)))


class TorchResNet(nn.Module):
    """Images [N, 3, H, W] to what `fc` makes of the features: logits, or the features themselves if there is none."""

    def __init__(self, depth: int, width_factor: int = 1, fc: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        fan_in = 64
        for stage, count in enumerate(DEPTHS[depth], start=1):
            channels, blocks = 32 * 2**stage, []
            for number in range(count):
                stride = 2 if stage > 1 and number == 0 else 1
                if depth < 50:
                    convs = [(channels, 3, stride), (channels, 3, 1)]
                else:
                    width = channels * width_factor
                    convs = [(width, 1, 1), (width, 3, stride), (4 * channels, 1, 1)]
                blocks.append(Block(fan_in, convs))
                fan_in = convs[-1][0]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.num_features = fan_in
        self.fc = nn.Identity() if fc is None else fc(fan_in)

    def trace(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What `forward` gives, and what leaves the stem and every block, in NHWC by our names."""
        seen = {}
        x = torch.relu(self.bn1(self.conv1(images)))
        seen["stem"] = x
        x = nn.functional.max_pool2d(x, 3, 2, padding=1)
        for stage in range(1, 5):
            for number, block in enumerate(getattr(self, f"layer{stage}"), start=1):
                x = block(x)
                seen[f"stage_{stage}/block_{number}"] = x
        return self.fc(x.mean((2, 3))), {name: value.permute(0, 2, 3, 1) for name, value in seen.items()}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits or features."""
        return self.trace(images)[0]


def torch_resnet(variant: str, state_dict: dict[str, np.ndarray]) -> TorchResNet:
    """The backbone `variant` with the tensors of `state_dict`, as `resnet_state_dict` gives them."""
    model = TorchResNet(*VARIANTS[variant])
    tensors: dict[str, Any] = {name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict(tensors | counters)
    return model
