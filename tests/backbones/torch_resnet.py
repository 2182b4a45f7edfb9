"""ResNets in PyTorch with random tensors, to compare ours with. A helper, not a test."""

import torch
from torch import nn

from pspinal_jax.benchmark.torch_reference import TorchResNet as TorchResNet


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
