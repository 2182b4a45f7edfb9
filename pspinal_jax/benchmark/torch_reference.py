"""The PyTorch side of the benchmarks: heads, backbones and training. Imports torch.

Run as a program, ``python -m pspinal_jax.benchmark.torch_reference MNIST.npz EPOCHS START``, it trains the MNIST row as
published.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from operator import attrgetter, getitem
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pspinal_jax.backbones import efficientnet, resnet, vgg5
from pspinal_jax.benchmark.timing import COMPILED, EAGER, GRAPH, REDUCED, Work, torch_device
from pspinal_jax.comparison.settings import HeadName, Hparams
from pspinal_jax.comparison.train import Schedule
from pspinal_jax.layers.depthwise import same_padding
from pspinal_jax.models import normalisation
from pspinal_jax.recipes.schema import Recipe


class TorchHead(nn.Module):
    """A head in PyTorch, on features [N, D]: the equations of pspinal_jax/heads, with ReLU."""

    def __init__(
        self,
        name: HeadName,
        num_features: int,
        num_classes: int,
        layer_width: int,
        num_layers: int = 4,
        dropout_rate: float = 0.2,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.num_layers = name, {"dense": 0, "mlp": 1}.get(name, num_layers)
        self.dropout = nn.Dropout(dropout_rate)
        features, hidden = torch.empty(1, num_features), [torch.empty(1, layer_width)] * self.num_layers
        fan_ins = [self._inputs(features, features, hidden[:i]).shape[1] for i in range(self.num_layers + 1)]
        self.layers = nn.ModuleList(nn.Linear(fan_in, layer_width) for fan_in in fan_ins[:-1])
        self.norms = nn.ModuleList(nn.BatchNorm1d(layer_width) if batch_norm else nn.Identity() for _ in self.layers)
        self.output = nn.Linear(fan_ins[-1], num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [N, C] of features [N, D]."""
        dropped = self.dropout(features) if self.name == "progressive" else features
        outputs: list[torch.Tensor] = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            outputs.append(torch.relu(norm(layer(self._inputs(features, dropped, outputs)))))
        return self.output(self._inputs(features, dropped, outputs))

    def _inputs(self, features: torch.Tensor, dropped: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
        """What a layer, or the output, sees after the layers that gave `outputs`."""
        if self.name == "progressive":
            return torch.cat([dropped, *outputs], 1) if outputs else features
        if self.name == "spinal" and len(outputs) < self.num_layers:
            half = features.tensor_split([features.shape[1] // 2], 1)[len(outputs) % 2]
            return self.dropout(torch.cat([half, *outputs[-1:]], 1))
        return self.dropout(torch.cat(outputs, 1) if outputs else features)


def load_head(
    params: dict[str, Any], dropout_rate: float, name: HeadName = "progressive", num_features: int | None = None
) -> TorchHead:
    """The head with the sizes and parameters of one of ours, given as its documented tree.

    `num_features` is needed of a SpinalNet head, whose layers see halves of the features.
    """
    layers = [params[f"layer_{index}"] for index in range(1, len(params))]
    (fan_in, num_classes), norm = params["output"]["kernel"].shape, bool(layers) and "norm" in layers[0]
    if layers:
        fan_in, layer_width = layers[0]["kernel"].shape
    sizes = (num_features or fan_in, num_classes, layer_width if layers else 0, len(layers))
    head = TorchHead(name, *sizes, dropout_rate, batch_norm=norm)
    for tree, layer, norm in zip(layers, head.layers, head.norms, strict=True):
        _copy(tree, layer, norm)
    _copy(params["output"], head.output)
    return head


def _copy(tree: dict[str, Any], layer: Any, norm: Any = None) -> None:
    """Take over kernel, bias and batch norm of one of our layers, given as its documented tree."""
    kernel = np.asarray(tree["kernel"])
    pairs = [(layer.weight, kernel.transpose((1, 0) if kernel.ndim == 2 else (3, 2, 0, 1)))]
    pairs += [(layer.bias, tree["bias"])] if "bias" in tree else []
    pairs += [(norm.weight, tree["norm"]["scale"]), (norm.bias, tree["norm"]["bias"])] if "norm" in tree else []
    for tensor, array in pairs:
        tensor.data.copy_(torch.from_numpy(np.array(array)))


class Unit(nn.Module):
    """activation(batch_norm(conv(x))), padded as torch does it, or for EfficientNet as TensorFlow does."""

    def __init__(
        self,
        fan_in: int,
        channels: int,
        side: int = 1,
        stride: int = 1,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = torch.relu,
        *,
        bias: bool = False,
        groups: int = 1,
        tensorflow: bool = False,
    ) -> None:
        super().__init__()
        padding = 0 if tensorflow else side // 2
        self.conv = nn.Conv2d(fan_in, channels, side, stride, padding, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(channels, eps=efficientnet.EPSILON if tensorflow else 1e-5)
        self.side, self.stride, self.activation, self.tensorflow = side, stride, activation, tensorflow

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """The unit's maps."""
        if self.tensorflow and self.side > 1:
            (top, bottom), (left, right) = same_padding(tuple(maps.shape[2:]), (self.side,) * 2, self.stride)
            maps = functional.pad(maps, (left, right, top, bottom))
        maps = self.norm(self.conv(maps))
        return maps if self.activation is None else self.activation(maps)


class Block(nn.Module):
    """Units in a row, by the names of our parameters; then what they began with is added, or its shortcut."""

    def __init__(self, units: dict[str, Unit], adds: bool = False, end: nn.Module | None = None) -> None:
        super().__init__()
        self.units, self.adds, self.end = nn.ModuleDict(units), adds, end or nn.Identity()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """The block's maps."""
        outputs = maps
        for name, unit in self.units.items():
            if name.endswith("shortcut"):
                maps = unit(maps)
            else:
                outputs = unit(outputs)
        return self.end(outputs + maps if self.adds else outputs)


def vgg5_blocks() -> Iterator[Block]:
    """Our `VGG5`."""
    fan_in = 1
    for stage, widths in enumerate(vgg5.STAGES, start=1):
        units = {}
        for index, width in enumerate(widths, start=1):
            units[f"stage_{stage}/conv_{index}"] = Unit(fan_in, width, 3, bias=True)
            fan_in = width
        yield Block(units, end=nn.MaxPool2d(2))


def resnet_blocks(name: str) -> Iterator[Block]:
    """Our `ResNet`."""
    variant, fan_in = resnet.VARIANTS[name], 64
    yield Block({"stem": Unit(3, fan_in, 7, 2)}, end=nn.MaxPool2d(3, 2, padding=1))
    for stage, depth in enumerate(variant.depths, start=1):
        for number in range(1, depth + 1):
            block, stride, width = f"stage_{stage}/block_{number}", 2 if stage > 1 and number == 1 else 1, fan_in
            convs = resnet.block_convs(variant, resnet.STAGE_CHANNELS[stage - 1], stride)
            units = {}
            for index, conv in enumerate(convs, start=1):
                units[f"{block}/conv_{index}"] = Unit(width, *conv, torch.relu if index < len(convs) else None)
                width = conv.channels
            if stride > 1 or fan_in != width:
                units[f"{block}/shortcut"] = Unit(fan_in, width, 1, stride, None)
            yield Block(units, adds=True, end=nn.ReLU())
            fan_in = width


_LiteUnit = partial(Unit, activation=functional.relu6, tensorflow=True)


def efficientnet_block(number: int, config: efficientnet.BlockConfig) -> Block:
    """Our `InvertedBottleneck`."""
    kernel, stride, expansion, fan_in, channels = config
    block, width = f"block_{number}", fan_in * expansion
    units = {f"{block}/expand": _LiteUnit(fan_in, width)} if expansion > 1 else {}
    units[f"{block}/depthwise"] = _LiteUnit(width, width, kernel, stride, groups=width)
    units[f"{block}/project"] = _LiteUnit(width, channels, activation=None)
    return Block(units, adds=stride == 1 and fan_in == channels)


def efficientnet_blocks(name: str) -> Iterator[Block]:
    """Our `EfficientNetLite`."""
    configs = efficientnet.block_configs(name)
    yield Block({"stem": _LiteUnit(3, 32, 3, 2)})
    for number, config in enumerate(configs, start=1):
        yield efficientnet_block(number, config)
    yield Block({"top": _LiteUnit(configs[-1].channels, efficientnet.NUM_FEATURES)})


class TorchBackbone(nn.Module):
    """Images [N, C, H, W] to features [N, D], by the name of one of our backbones; channels last in memory."""

    def __init__(self, name: str) -> None:
        super().__init__()
        build = efficientnet_blocks if name.startswith("efficientnet") else resnet_blocks
        blocks = vgg5_blocks() if name == "vgg5" else build(name)
        self.blocks = nn.Sequential(*blocks).to(memory_format=torch.channels_last)

    @property
    def units(self) -> dict[str, Unit]:
        """By the names of our parameters."""
        return {name: unit for block in self.blocks for name, unit in block.units.items()}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features."""
        return self.blocks(images).mean((2, 3))


def load_units(units: Mapping[str, Unit], params: dict[str, Any]) -> None:
    """Take over the parameters of our backbone, or block."""
    for name, unit in units.items():
        _copy(reduce(getitem, name.split("/"), params), unit.conv, unit.norm)


class TorchClassifier(nn.Module):
    """Logits [N, C] of standardised images [N, H, W, 1 or 3]: the backbone or none, then the head."""

    def __init__(self, backbone: TorchBackbone | None, head: TorchHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits."""
        # A view of [N, H, W, C] as [N, C, H, W] is channels-last as it lies.
        return self.head(images.flatten(1) if self.backbone is None else self.backbone(images.permute(0, 3, 1, 2)))


def build_classifier(recipe: Recipe, variables: dict[str, Any], num_features: int | None = None) -> TorchClassifier:
    """The PyTorch classifier of `recipe` with our variables; see `load_head`."""
    params, name = variables["params"], recipe.model.backbone
    backbone = None if name == "none" else TorchBackbone(name)
    if backbone is not None:
        load_units(backbone.units, params["backbone"])
    settings = recipe.model
    return TorchClassifier(backbone, load_head(params["head"], settings.dropout_rate, settings.head, num_features))


Step = Callable[..., torch.Tensor]


def training_step(
    mode: str,
    loss_of: Step,
    clear: Callable[[], Any],
    update: Callable[[], Any],
    rewind: Callable[[], Any] = lambda: None,
) -> Step:
    """The step that clears the gradients, computes them anew, updates by them, and returns the loss.

    Args:
      mode: `EAGER`, `COMPILED` or `REDUCED`, in which the loss is compiled, or `GRAPH`, a CUDA graph of the whole step.
      loss_of: the loss of some inputs.
      clear: drops the gradients.
      update: the optimiser's step.
      rewind: undoes all steps since the first, in place; see `_recorded`.
    """
    if mode in (COMPILED, REDUCED):
        loss_of = torch.compile(loss_of, mode="reduce-overhead" if mode == REDUCED else None)

    def step(*inputs: torch.Tensor) -> torch.Tensor:
        if mode == REDUCED:
            torch.compiler.cudagraph_mark_step_begin()
        clear()
        loss = loss_of(*inputs)
        loss.backward()
        update()
        return loss

    return _recorded(step, rewind) if mode == GRAPH else step


_WARM_UPS = 3


def _recorded(step: Step, rewind: Callable[[], Any]) -> Step:
    """`step` as one CUDA graph, recorded at the first call and played from then on, with inputs at a fixed place.

    Libraries and optimiser allocate in the first steps, which must not be in the graph. They are taken on a side
    stream, as PyTorch's notes on CUDA graphs demand, and undone by `rewind`.
    """
    recording: list[Any] = []

    def played(inputs: torch.Tensor) -> torch.Tensor:
        if not recording:
            place = inputs if inputs.requires_grad else inputs.clone()  # a leaf is the same at every call
            _aside(lambda: [step(place) for _ in range(_WARM_UPS)])
            rewind()
            recording.extend((place, *_record(lambda: step(place))))
        place, play, loss = recording
        if inputs is not place:
            place.copy_(inputs)
        play()
        return loss

    return played


def _aside(call: Callable[[], Any]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)


def _record(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], Any], torch.Tensor]:
    """What plays the recorded work, and the tensor that its result comes to lie in."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


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
      mode: see `training_step`.
    """
    device, config = torch_device(), recipe.optimizer
    num_features = data.images[0].size if recipe.model.backbone == "none" else None
    model = build_classifier(recipe, variables, num_features).to(device).train()
    images, labels = torch.from_numpy(data.images).to(device), torch.from_numpy(data.labels).long().to(device)
    shift, scale = (torch.as_tensor(value, device=device) for value in normalisation(recipe))
    if config.name == "sgd":
        made: Any = partial(torch.optim.SGD, momentum=config.momentum, nesterov=config.nesterov)
    else:
        kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        made = partial(kind, betas=(config.momentum, 0.999), capturable=mode == GRAPH and device == "cuda")
    optimizer = made(_by_decay(model, config.weight_decay), lr=config.learning_rate, fused=True)
    forward = computing_in(recipe.dtype, model)
    begun = copy.deepcopy(model.state_dict())

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        inputs = images[rows]
        if inputs.dtype == torch.uint8:
            inputs = (inputs.float() / 255 - shift) / scale
        return functional.cross_entropy(forward(inputs), labels[rows], label_smoothing=recipe.label_smoothing)

    def rewind() -> None:
        model.load_state_dict(begun)
        for state in optimizer.state.values():
            for value in filter(torch.is_tensor, state.values()):  # momenta, and Adam's number of steps
                value.zero_()

    return training_step(mode, loss_of, optimizer.zero_grad, optimizer.step, rewind), model


_TWIN = {
    "model.layer_dropout_rate": 0.0,
    "optimizer.backbone_rate": 1.0,
    "micro_batches": 1,
    "freeze": "none",
    "class_weights": "none",
    "gradient_clip": 0.0,
    "ema_decay": 0.0,
    "num_seeds": 1,
}
"""The settings that the PyTorch side has not, at the values at which they do nothing."""


def missing_setting(recipe: Recipe) -> str | None:
    """The first setting of `recipe` that `recipe_step` would ignore; None where it computes the same."""
    return next((name for name, value in _TWIN.items() if attrgetter(name)(recipe) != value), None)


def _by_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimiser's groups: kernels, which decay, and everything else."""
    kernels, others = ([p for p in model.parameters() if (p.ndim > 1) == decays] for decays in (True, False))
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def warped(images: torch.Tensor) -> torch.Tensor:
    """Random perspective (p 0.5) and rotation (up to 10 degrees) of images uint8 [N, H, W, C], in one bilinear pass."""
    corners = images.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float32).expand(len(images), 4, 2)
    moves = torch.rand_like(corners[:, :1, :1]) < 0.5
    (x, y), (u, v) = (corners * (1 - 0.5 * moves * torch.rand_like(corners))).unbind(-1), corners.unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows = [[x, y, one, zero, zero, zero, -u * x, -u * y], [zero, zero, zero, x, y, one, -v * x, -v * y]]
    equations = torch.cat([torch.stack(row, -1) for row in rows], 1)
    solved = torch.linalg.solve(equations, torch.cat([u, v], 1))
    matrix = torch.cat([solved, one[:, :1]], 1).view(-1, 3, 3)
    angles = (2 * torch.rand_like(one[:, 0]) - 1) * math.radians(10)
    sine, cosine = angles.sin(), angles.cos()
    turned = torch.eye(3, device=images.device).repeat(len(images), 1, 1)
    turned[:, :2, :2] = torch.stack([cosine, -sine, sine, cosine], 1).view(-1, 2, 2)
    maps = images.permute(0, 3, 1, 2).float()
    grid = functional.affine_grid(turned[:, :2], list(maps.shape), align_corners=False)
    points = torch.cat([grid, torch.ones_like(grid[..., :1])], -1).flatten(1, 2) @ matrix.mT
    places = (points[..., :2] / points[..., 2:]).view_as(grid)
    return functional.grid_sample(maps, places, align_corners=False).permute(0, 2, 3, 1).to(torch.uint8)


def backbone_features(recipe: Recipe, data: Any) -> Work:
    """Passes of the backbone of `recipe` over ``data.images``, without training and with random parameters."""
    device = torch_device()
    forward = computing_in(recipe.dtype, TorchBackbone(recipe.model.backbone).to(device).eval())
    images = torch.from_numpy(data.images).to(device)
    return passes(lambda images: forward((images.float() / 255).permute(0, 3, 1, 2)), images)


def passes(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> Work:
    """So many calls of `function` on `images`, without gradients; returns when they are done."""

    def run(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                result = function(images)
            float(result.flatten()[0])  # waits for the device

    return run


def computing_in(dtype: str, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """`model` with its products in `dtype` (by autocast for bfloat16) and logits in float32."""

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            logits: torch.Tensor = model(inputs)
        return logits.float()

    return model if dtype == "float32" else forward


class ImageExamples(torch.utils.data.Dataset):
    """Images uint8 [N, H, W] one by one as PIL images made into tensors, as the published scripts' loaders do it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean: Any, std: Any) -> None:
        self._images, self._labels, self._mean, self._std = images, labels, mean, std

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """A standardised image [H, W, 1] and its label."""
        from PIL import Image

        pixels = torch.from_numpy(np.array(Image.fromarray(self._images[index]))).float().div(255).unsqueeze(-1)
        return (pixels - self._mean) / self._std, int(self._labels[index])


def published_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any]) -> None:
    """An epoch as the published scripts have it, over the batches of a DataLoader."""
    device = next(model.parameters()).device

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(images.to(device)), labels.to(device))

    step = training_step(EAGER, loss_of, optimizer.zero_grad, optimizer.step)
    for batch in batches:
        loss = step(*batch)
    float(loss.detach())  # waits for the device


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
    model = TorchClassifier(None, TorchHead("progressive", 784, 10, 128, batch_norm=True))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.5)
    for epoch in range(1, epochs + 1):
        published_epoch(model.train(), optimizer, train_loader)
        model.eval()
        with torch.no_grad():
            correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test_loader)
        line = {"epoch": epoch, "test": 100 * correct / len(test), "seconds": time.time() - start}
        print(json.dumps(line), flush=True)


def train_head(
    model: nn.Module, schedule: Schedule, hparams: Hparams, seed: int, inputs: np.ndarray, labels: np.ndarray
) -> None:
    """The training of `pspinal_jax.comparison.train.train_head` in eager PyTorch, one thread a core."""
    torch.manual_seed(seed)
    features, targets = torch.from_numpy(inputs), torch.from_numpy(labels).long()
    optimizer = torch.optim.AdamW(_by_decay(model, hparams.weight_decay), lr=hparams.learning_rate)
    smoothed = partial(functional.cross_entropy, label_smoothing=hparams.label_smoothing)
    step = training_step(
        EAGER, lambda rows: smoothed(model(features[rows]), targets[rows]), optimizer.zero_grad, optimizer.step
    )
    for rates in schedule.rates():
        order = torch.randperm(len(features))
        for rate, rows in zip(rates.tolist(), order.split(schedule.batch_size), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = hparams.learning_rate * rate
            step(rows)


if __name__ == "__main__":
    path, epochs, start = sys.argv[1:]
    train_published(dict(np.load(path)), int(epochs), float(start))
