"""ResNets in PyTorch with torchvision's names and random tensors, to compare ours with. A helper, not a test."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits or features."""
        maps = functional.max_pool2d(torch.relu(self.bn1(self.conv1(images))), 3, 2, padding=1)
        for stage in range(1, 5):
            maps = getattr(self, f"layer{stage}")(maps)
        return self.fc(maps.mean((2, 3)))


def randomised(model, seed=0):
    """`model` with random kernels and all four batch-norm tensors random (fresh ones are 1, 0, 0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (1 / fan_in) ** 0.5, generator=generator)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


def arrays_of(model):
    """The state dict as NumPy arrays of its own (torch updates its buffers in place)."""
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def traced(model, images):
    """Features, and the outputs of the stem and of every block, in NHWC by our names."""
    seen = {}

    def keep(name, maps):
        seen[name] = maps.permute(0, 2, 3, 1)

    hooks = [model.bn1.register_forward_hook(lambda module, inputs, output: keep("stem", torch.relu(output)))]
    for stage in range(1, 5):
        for number, block in enumerate(getattr(model, f"layer{stage}"), start=1):
            name = f"stage_{stage}/block_{number}"
            hooks.append(block.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output)))
    features = model(images)
    for hook in hooks:
        hook.remove()
    return features, seen
