"""VGG-5 in PyTorch, and from its state to ours. A helper, not a test."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

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
                conv, norm = nn.Conv2d(fan_in, width, 3, padding=1), nn.BatchNorm2d(width)
                layers.append(nn.ModuleDict({"conv": conv, "norm": norm}))
                fan_in = width
            self.stages.append(layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features."""
        maps = images
        for layers in self.stages:
            for layer in layers:
                maps = torch.relu(layer["norm"](layer["conv"](maps)))
            maps = functional.max_pool2d(maps, 2, 2)
        return maps.flatten(1)


def randomised(seed: int) -> TorchVGG5:
    """A module whose batch-norm weight, bias, mean and variance are all random (fresh ones are 1, 0, 0, 1)."""
    torch.manual_seed(seed)
    model = TorchVGG5()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
    return model


def traced(model: TorchVGG5, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The features, and the outputs of every ReLU and every pool, in NHWC."""
    seen, maps = {}, images
    for s, layers in enumerate(model.stages, start=1):
        for i, layer in enumerate(layers, start=1):
            maps = torch.relu(layer["norm"](layer["conv"](maps)))
            seen[f"stage_{s}/conv_{i}"] = maps.permute(0, 2, 3, 1)
        maps = nn.functional.max_pool2d(maps, 2, 2)
        seen[f"stage_{s}"] = maps.permute(0, 2, 3, 1)
    return maps.flatten(1), seen


def variables_of(model: TorchVGG5) -> dict:
    """{'params', 'batch_stats'} of our VGG5, from the torch module's state."""
    params, stats = {}, {}
    for s, layers in enumerate(model.stages, start=1):
        params[f"stage_{s}"], stats[f"stage_{s}"] = {}, {}
        for i, layer in enumerate(layers, start=1):
            norm = layer["norm"]
            params[f"stage_{s}"][f"conv_{i}"] = {
                "kernel": as_numpy(layer["conv"].weight.permute(2, 3, 1, 0)),
                "bias": as_numpy(layer["conv"].bias),
                "norm": {"scale": as_numpy(norm.weight), "bias": as_numpy(norm.bias)},
            }
            running = {"mean": as_numpy(norm.running_mean), "var": as_numpy(norm.running_var)}
            stats[f"stage_{s}"][f"conv_{i}"] = {"norm": running}
    return {"params": params, "batch_stats": stats}


def gradients_of(model: TorchVGG5) -> dict:
    """The gradients, laid out as our parameters."""
    twin = TorchVGG5().to(next(model.parameters()).dtype)
    with torch.no_grad():
        for target, source in zip(twin.parameters(), model.parameters(), strict=True):
            target.copy_(source.grad)
    return variables_of(twin)["params"]


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    # torch updates its buffers in place, and a view would change with them.
    return tensor.detach().numpy().copy()
