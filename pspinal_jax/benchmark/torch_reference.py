"""The PyTorch side of the benchmarks: heads, VGG-5, ResNets, EfficientNet-Lite and training. Imports torch.

The ResNets have torchvision's names for their tensors. Run as a program,
``python -m pspinal_jax.benchmark.torch_reference MNIST.npz EPOCHS START``, it trains the MNIST row as published.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pspinal_jax.backbones import efficientnet
from pspinal_jax.benchmark.timing import Work, torch_device
from pspinal_jax.comparison.settings import HeadName, Hparams
from pspinal_jax.comparison.train import Schedule
from pspinal_jax.layers.depthwise import same_padding
from pspinal_jax.models import normalisation
from pspinal_jax.recipes.schema import Recipe


class TorchProgressiveHead(nn.Module):
    """The progressive head in PyTorch, on features [N, D]: the equation of pspinal_jax/heads/equation.py."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        layer_width: int,
        num_layers: int = 4,
        dropout_rate: float = 0.2,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [num_features + index * layer_width for index in range(num_layers + 1)]
        self.layers = nn.ModuleList(nn.Linear(width, layer_width) for width in widths[:-1])
        self.norms = nn.ModuleList(nn.BatchNorm1d(layer_width) for _ in range(num_layers)) if batch_norm else None
        self.output = nn.Linear(widths[-1], num_classes)
        self.dropout_rate = dropout_rate

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [N, C] of features [N, D]."""
        dropped = functional.dropout(features, self.dropout_rate, self.training)
        outputs: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            hidden = layer(torch.cat([dropped, *outputs], 1) if outputs else features)
            if self.norms is not None:
                hidden = self.norms[index](hidden)
            outputs.append(functional.relu(hidden))
        return self.output(torch.cat([dropped, *outputs], 1))


def load_head(params: dict[str, Any], dropout_rate: float) -> TorchProgressiveHead:
    """The head with the sizes and parameters of a `ProgressiveSpinalHead`, given as its documented tree."""
    layers = [params[f"layer_{index}"] for index in range(1, len(params))]
    (num_features, layer_width), num_classes = layers[0]["kernel"].shape, params["output"]["kernel"].shape[1]
    head = TorchProgressiveHead(
        num_features, num_classes, layer_width, len(layers), dropout_rate, batch_norm="norm" in layers[0]
    )
    norms = head.norms or [None] * len(layers)
    for tree, layer, norm in zip(layers, head.layers, norms, strict=True):
        _copy(tree, layer, norm)
    _copy(params["output"], head.output)
    return head


def _copy(tree: dict[str, Any], layer: Any, norm: Any = None) -> None:
    """Take over kernel, bias and batch norm of one of our layers, given as its documented tree."""
    kernel = np.asarray(tree["kernel"])
    pairs = [(layer.weight, kernel.transpose((1, 0) if kernel.ndim == 2 else (3, 2, 0, 1)))]
    if layer.bias is not None:
        pairs.append((layer.bias, tree["bias"]))
    if norm is not None:
        pairs += [(norm.weight, tree["norm"]["scale"]), (norm.bias, tree["norm"]["bias"])]
    for tensor, array in pairs:
        tensor.data.copy_(torch.from_numpy(np.array(array)))


class TorchClassifier(nn.Module):
    """Logits [N, C] of standardised images [N, H, W, 1]: VGG-5 (channels last in memory) or none, then the head."""

    def __init__(self, backbone: nn.Module | None, head: TorchProgressiveHead) -> None:
        super().__init__()
        self.backbone = backbone if backbone is None else backbone.to(memory_format=torch.channels_last)
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits."""
        # A view of [N, H, W, 1] as [N, 1, H, W] is channels-last as it lies.
        features = images.flatten(1) if self.backbone is None else self.backbone(images.permute(0, 3, 1, 2))
        return self.head(features)


Step = Callable[..., torch.Tensor]


def _eager(loss_of: Step, clear: Callable[[], Any], update: Callable[[], Any]) -> Step:
    def step(*inputs: torch.Tensor) -> torch.Tensor:
        clear()
        loss = loss_of(*inputs)
        loss.backward()
        update()
        return loss

    return step


def _compiled(loss_of: Step, clear: Callable[[], Any], update: Callable[[], Any]) -> Step:
    return _eager(torch.compile(loss_of), clear, update)


EAGER = "PyTorch eager"
MODES: dict[str, Callable[[Step, Callable[[], Any], Callable[[], Any]], Step]] = {
    EAGER: _eager,
    "torch.compile": _compiled,
}
"""By name, from a loss, what clears the gradients and what updates with them to a step that returns the loss."""


def repeated(step: Step, inputs: Callable[[int], Any]) -> Work:
    """So many steps, the i-th on ``inputs(i)``; returns when they are done."""

    def run(count: int) -> None:
        for index in range(count):
            loss = step(inputs(index))
        float(loss.detach())  # waits for the device

    return run


def recipe_step(recipe: Recipe, data: Any, variables: dict[str, Any], mode: str) -> tuple[Step, nn.Module]:
    """The training step of `recipe`, which returns the loss of the examples at given indices, and its model.

    Args:
      recipe: the recipe.
      data: `images`, `labels`; they are copied to the device.
      variables: our initial parameters and running statistics.
      mode: out of `MODES`.
    """
    device, config = torch_device(), recipe.optimizer
    model = build_classifier(recipe, variables).to(device).train()
    images, labels = torch.from_numpy(data.images).to(device), torch.from_numpy(data.labels).long().to(device)
    shift, scale = (torch.as_tensor(value, device=device) for value in normalisation(recipe))
    if config.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), config.learning_rate, config.momentum, fused=True
        )
    else:
        optimizer = torch.optim.Adam(model.parameters(), config.learning_rate, (config.momentum, 0.999), fused=True)
    forward = computing_in(recipe.dtype, model)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(forward((images[rows].float() / 255 - shift) / scale), labels[rows])

    return MODES[mode](loss_of, partial(optimizer.zero_grad, set_to_none=True), optimizer.step), model


def build_classifier(recipe: Recipe, variables: dict[str, Any]) -> TorchClassifier:
    """The PyTorch classifier of `recipe` with our variables."""
    params, name = variables["params"], recipe.model.backbone
    if name == "none":
        backbone: nn.Module | None = None
    elif name.startswith("resnet") or name.startswith("wide_resnet"):
        from pspinal_jax.weights import resnet_state_dict  # loads safetensors, which not every benchmark needs

        own = {collection: tree["backbone"] for collection, tree in variables.items()}
        backbone = torch_resnet(name, resnet_state_dict(own, name))
    else:
        backbone = TorchVGG5() if name == "vgg5" else TorchEfficientNetLite(name)
        backbone.load(params["backbone"])
    return TorchClassifier(backbone, load_head(params["head"], recipe.model.dropout_rate))


def backbone_features(recipe: Recipe, data: Any) -> Work:
    """Passes of the backbone of `recipe` over ``data.images``, without training and with random parameters."""
    name, device = recipe.model.backbone, torch_device()
    backbone = TorchEfficientNetLite(name) if name.startswith("efficientnet") else TorchResNet(*VARIANTS[name])
    forward = computing_in(recipe.dtype, backbone.to(device, memory_format=torch.channels_last).eval())
    images = torch.from_numpy(data.images).to(device)

    def run(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                result = forward((images.float() / 255).permute(0, 3, 1, 2))
            float(result[0, 0])  # waits for the device

    return run


def computing_in(dtype: str, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """`model` with its products in `dtype` (by autocast for bfloat16) and logits in float32."""
    if dtype == "float32":
        return model

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs.device.type, getattr(torch, dtype)):
            logits: torch.Tensor = model(inputs)
        return logits.float()

    return forward


class ImageExamples(torch.utils.data.Dataset):
    """Images uint8 [N, H, W] one by one as PIL images made into tensors, as the published scripts' loaders do it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean: Any, std: Any) -> None:
        self._images, self._labels, self._mean, self._std = images, labels, mean, std

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """A standardised image [H, W, 1] and its label."""
        from PIL import Image

        pixels = np.array(Image.fromarray(self._images[index]))
        return (torch.from_numpy(pixels).float().div(255).unsqueeze(-1) - self._mean) / self._std, int(
            self._labels[index]
        )


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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits or features."""
        maps = functional.max_pool2d(torch.relu(self.bn1(self.conv1(images))), 3, 2, padding=1)
        for stage in range(1, 5):
            maps = getattr(self, f"layer{stage}")(maps)
        return self.fc(maps.mean((2, 3)))


def torch_resnet(variant: str, state_dict: dict[str, np.ndarray]) -> TorchResNet:
    """The backbone `variant` with the tensors of `state_dict`, as `resnet_state_dict` gives them."""
    model = TorchResNet(*VARIANTS[variant])
    tensors: dict[str, Any] = {name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict(tensors | counters)
    return model


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

    def load(self, params: dict[str, Any]) -> None:
        """Take over the parameters of our `VGG5`."""
        for s, layers in enumerate(self.stages, start=1):
            for i, layer in enumerate(layers, start=1):
                _copy(params[f"stage_{s}"][f"conv_{i}"], layer["conv"], layer["norm"])


class TorchEfficientNetLite(nn.Module):
    """Images [N, 3, H, W] to features [N, 1280]: our `EfficientNetLite`, with TensorFlow's padding."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.num_features = efficientnet.NUM_FEATURES
        self.blocks = efficientnet.block_configs(variant)
        self.units = nn.ModuleDict({"stem": ConvNormRelu6(3, 32, 3, 2)})
        for number, config in enumerate(self.blocks, start=1):
            self.units.update(self.units_of(number, config))
        self.units["top"] = ConvNormRelu6(self.blocks[-1].channels, self.num_features)

    @staticmethod
    def units_of(number: int, config: efficientnet.BlockConfig) -> dict[str, nn.Module]:
        """The convolutions of a block, by name."""
        kernel, stride, expansion, fan_in, channels = config
        width = fan_in * expansion
        units: dict[str, nn.Module] = {}
        if expansion > 1:
            units[f"block_{number}/expand"] = ConvNormRelu6(fan_in, width)
        units[f"block_{number}/depthwise"] = ConvNormRelu6(width, width, kernel, stride, groups=width)
        units[f"block_{number}/project"] = ConvNormRelu6(width, channels, relu=False)
        return units

    def block(self, number: int, maps: torch.Tensor) -> torch.Tensor:
        """The maps after block `number`."""
        outputs = maps
        for name in ("expand", "depthwise", "project"):
            if f"block_{number}/{name}" in self.units:
                outputs = self.units[f"block_{number}/{name}"](outputs)
        return maps + outputs if outputs.shape == maps.shape else outputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features."""
        maps = self.units["stem"](images)
        for number in range(1, len(self.blocks) + 1):
            maps = self.block(number, maps)
        return self.units["top"](maps).mean((2, 3))

    def load(self, params: dict[str, Any]) -> None:
        """Take over the parameters of our `EfficientNetLite`."""
        for name, unit in self.units.items():
            tree = params
            for part in name.split("/"):
                tree = tree[part]
            _copy(tree, unit.conv, unit.norm)


class ConvNormRelu6(nn.Module):
    """relu6(batch_norm(conv(x))) with TensorFlow's SAME padding; `relu` False leaves the last step out."""

    def __init__(
        self, fan_in: int, channels: int, side: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(fan_in, channels, side, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=efficientnet.EPSILON)
        self.side, self.stride, self.relu = side, stride, relu

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """The unit's maps."""
        if self.side > 1:
            (top, bottom), (left, right) = same_padding(tuple(maps.shape[2:]), (self.side,) * 2, self.stride)
            maps = functional.pad(maps, (left, right, top, bottom))
        maps = self.norm(self.conv(maps))
        return functional.relu6(maps) if self.relu else maps


def train_published(arrays: dict[str, np.ndarray], epochs: int, start: float) -> None:
    """Train the MNIST row as published; after each epoch print its number, the test accuracy in per cent and the time.

    SGD 1e-3 with momentum 0.5, batch 64, dropout 0.2, batch norm, no augmentation.

    Args:
      arrays: train_images uint8 [N, 28, 28], train_labels [N], test_images, test_labels.
      epochs: number of epochs; the script has 50.
      start: a time of `time.time`, from which seconds are counted.
    """
    torch.manual_seed(0)
    train, test = (
        ImageExamples(arrays[f"{name}_images"], arrays[f"{name}_labels"], 0.1307, 0.3081) for name in ("train", "test")
    )
    train_loader = torch.utils.data.DataLoader(train, 64, shuffle=True)
    test_loader = torch.utils.data.DataLoader(test, 1000)
    model = TorchClassifier(None, TorchProgressiveHead(784, 10, 128, batch_norm=True))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.5)
    for epoch in range(1, epochs + 1):
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test_loader)
        line = {"epoch": epoch, "test": 100 * correct / len(test), "seconds": time.time() - start}
        print(json.dumps(line), flush=True)


class TorchSpinalHead(nn.Module):
    """SpinalNet's head in PyTorch, with four hidden layers."""

    def __init__(self, num_features: int, num_classes: int, layer_width: int, rate: float) -> None:
        super().__init__()
        self.half = num_features // 2
        widths = [self.half] + [self.half + layer_width] * 3
        self.layers = nn.ModuleList(nn.Linear(width, layer_width) for width in widths)
        self.output = nn.Linear(4 * layer_width, num_classes)
        self.dropout = nn.Dropout(rate)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [N, C] of features [N, D]."""
        halves, outputs = features.split(self.half, 1), list[torch.Tensor]()
        for index, layer in enumerate(self.layers):
            inputs = torch.cat([halves[index % 2], *outputs[-1:]], 1)
            outputs.append(torch.relu(layer(self.dropout(inputs))))
        return self.output(self.dropout(torch.cat(outputs, 1)))


def torch_head(name: HeadName, num_features: int, num_classes: int, layer_width: int, rate: float) -> nn.Module:
    """The PyTorch module of a head with four hidden layers of `layer_width`, or one (mlp), or none (dense)."""
    if name == "progressive":
        return TorchProgressiveHead(num_features, num_classes, layer_width, 4, rate)
    if name == "spinal":
        return TorchSpinalHead(num_features, num_classes, layer_width, rate)
    widths = [num_features, num_classes] if name == "dense" else [num_features, layer_width, num_classes]
    layers: list[nn.Module] = []
    for fan_in, width in itertools.pairwise(widths):
        layers += [nn.ReLU()] * bool(layers) + [nn.Dropout(rate), nn.Linear(fan_in, width)]
    return nn.Sequential(*layers)


def train_head(
    model: nn.Module, schedule: Schedule, hparams: Hparams, seed: int, inputs: np.ndarray, labels: np.ndarray
) -> None:
    """The training of `pspinal_jax.comparison.train.train_head` in eager PyTorch, one thread a core."""
    torch.manual_seed(seed)
    features, targets = torch.from_numpy(inputs), torch.from_numpy(labels).long()
    kernels, biases = ([p for p in model.parameters() if (p.ndim == 2) == two] for two in (True, False))
    groups = [{"params": kernels, "weight_decay": hparams.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=hparams.learning_rate)
    for rates in schedule.rates():
        order = torch.randperm(len(features))
        for rate, rows in zip(rates.tolist(), order.split(schedule.batch_size), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = hparams.learning_rate * rate
            optimizer.zero_grad(set_to_none=True)
            logits = model(features[rows])
            functional.cross_entropy(logits, targets[rows], label_smoothing=hparams.label_smoothing).backward()
            optimizer.step()


if __name__ == "__main__":
    path, epochs, start = sys.argv[1:]
    train_published(dict(np.load(path)), int(epochs), float(start))
