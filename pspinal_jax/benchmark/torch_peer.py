"""The PyTorch side of the measurements: the same head and training step, eager or compiled. Imports torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional


class TorchProgressiveHead(nn.Module):
    """The progressive head of SPEC's equation in PyTorch, on features [N, D]."""

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

    def load(self, params: dict[str, Any]) -> None:
        """Take over the parameters of a `ProgressiveSpinalHead`, given as its documented tree."""

        def copy(module: nn.Module, name: str, array: Any) -> None:
            getattr(module, name).data.copy_(torch.from_numpy(np.array(array)))

        layers = [(layer, params[f"layer_{index + 1}"]) for index, layer in enumerate(self.layers)]
        for layer, tree in [*layers, (self.output, params["output"])]:
            copy(layer, "weight", np.asarray(tree["kernel"]).T)
            copy(layer, "bias", tree["bias"])
        if self.norms is not None:
            for norm, (_, tree) in zip(self.norms, layers, strict=True):
                copy(norm, "weight", tree["norm"]["scale"])
                copy(norm, "bias", tree["norm"]["bias"])


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


def make_step(
    model: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
    compiled: bool,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A training step on the examples at the given indices, which returns the loss; data lie on the model's device."""
    shift, scale = (torch.as_tensor(value, device=images.device) for value in (mean, std))

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        inputs = (images[rows].float() / 255 - shift) / scale
        return functional.cross_entropy(model(inputs), labels[rows])

    forward = torch.compile(loss_of) if compiled else loss_of

    def step(rows: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(rows)
        loss.backward()
        optimizer.step()
        return loss

    return step


def computing_in(dtype: str, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """`model` with its products in `dtype` (by autocast for bfloat16) and logits in float32."""
    if dtype == "float32":
        return model

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs.device.type, getattr(torch, dtype)):
            logits: torch.Tensor = model(inputs)
        return logits.float()

    return forward


def torch_device() -> str:
    """The device that the comparison runs on: a GPU where JAX runs on one."""
    import jax  # not needed by who runs PyTorch alone

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


class PictureExamples(torch.utils.data.Dataset):
    """Images uint8 [N, H, W] one by one as PIL pictures made into tensors, as the published scripts' loaders do it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean: Any, std: Any) -> None:
        self._images, self._labels, self._mean, self._std = images, labels, mean, std

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """A standardised image [H, W, 1] and its label."""
        pixels = np.array(Image.fromarray(self._images[index]))
        return (torch.from_numpy(pixels).float().div(255).unsqueeze(-1) - self._mean) / self._std, int(
            self._labels[index]
        )


def make_head(shape: Any, dropout_rate: float, params: dict[str, Any]) -> TorchProgressiveHead:
    """The head of `shape` (num_features, layer_width, num_layers, num_classes, ..) with our parameters, training."""
    model = TorchProgressiveHead(
        shape.num_features, shape.num_classes, shape.layer_width, shape.num_layers, dropout_rate
    )
    model.load(params)
    return model.train()
