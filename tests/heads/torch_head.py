"""The head in PyTorch, written from its equations, to compare ours with."""

import numpy as np
import torch
from torch import nn


class TorchHead(nn.Module):
    """u = x * mask_u;  y_1 = act(norm(W_1 x + b_1));  y_i = act(norm(W_i [u, y_1 .. y_{i-1}] + b_i));  W [u, y] + b.

    Masks are arguments rather than drawn: dropout multiplies with 0 or 1 / (1 - rate). `input_masks` holds one for the
    whole input of each layer and of the output.
    """

    def __init__(self, num_features, width, num_layers, num_classes, batch_norm):
        super().__init__()
        fan_ins = [num_features + i * width for i in range(num_layers + 1)]
        self.hidden = nn.ModuleList(nn.Linear(fan_in, width) for fan_in in fan_ins[:-1])
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if batch_norm else nn.Identity() for _ in self.hidden)
        self.output = nn.Linear(fan_ins[-1], num_classes)

    def forward(self, features, features_mask=None, input_masks=None):
        u = features if features_mask is None else features * features_mask
        outputs = []
        for i, linear in enumerate([*self.hidden, self.output]):
            inputs = torch.cat([u, *outputs], dim=1) if i > 0 else features
            if input_masks is not None:
                inputs = inputs * input_masks[i]
            values = linear(inputs)
            if linear is not self.output:
                outputs.append(torch.relu(self.norms[i](values)))
        return values


def results(head, variables, features, weights, train, masks=(None, None)):
    """What the model makes of our variables and features: logits, new running statistics, and gradients of
    sum(weights * logits). Trees are named as ours.
    """
    sizes = (features.shape[1], head.layer_width, head.num_layers, head.num_classes)
    model = TorchHead(*sizes, batch_norm=head.norm == "batch").to(torch.tensor(features).dtype)
    _load(model, variables)
    model.train(train)
    inputs = torch.tensor(features, requires_grad=True)
    logits = model(inputs, *masks)
    (logits * torch.tensor(weights)).sum().backward()
    return {
        "logits": logits.detach().numpy(),
        "params_gradient": _gradients(model),
        "features_gradient": inputs.grad.numpy(),
        "batch_stats": _statistics(model),
    }


def _load(model, variables):
    """Copy our variables into the model; torch keeps a kernel transposed."""

    def copy(target, values):
        with torch.no_grad():
            target.copy_(torch.tensor(np.asarray(values)))

    for name, linear in _layers(model):
        layer = variables["params"][name]
        copy(linear.weight, np.asarray(layer["kernel"]).T)
        copy(linear.bias, layer["bias"])
        norm = _norm(model, name)
        if norm is not None:
            running = variables["batch_stats"][name]["norm"]
            copy(norm.weight, layer["norm"]["scale"])
            copy(norm.bias, layer["norm"]["bias"])
            copy(norm.running_mean, running["mean"])
            copy(norm.running_var, running["var"])


def _gradients(model):
    """The gradients that backward() left in the model, as a tree like our params."""
    tree = {}
    for name, linear in _layers(model):
        tree[name] = {"kernel": linear.weight.grad.numpy().T.copy(), "bias": linear.bias.grad.numpy()}
        norm = _norm(model, name)
        if norm is not None:
            tree[name]["norm"] = {"scale": norm.weight.grad.numpy(), "bias": norm.bias.grad.numpy()}
    return tree


def _statistics(model):
    """The model's running statistics, as a tree like our batch_stats."""
    tree = {}
    for name, _ in _layers(model):
        norm = _norm(model, name)
        if norm is not None:
            tree[name] = {"norm": {"mean": norm.running_mean.numpy().copy(), "var": norm.running_var.numpy().copy()}}
    return tree


def _layers(model):
    return [*((f"layer_{i}", linear) for i, linear in enumerate(model.hidden, 1)), ("output", model.output)]


def _norm(model, name):
    norm = None if name == "output" else model.norms[int(name.removeprefix("layer_")) - 1]
    return norm if isinstance(norm, nn.BatchNorm1d) else None
