"""`benchmark epoch`: a whole epoch of the MNIST row, data handling included, beside its peers."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pspinal_jax.benchmark.step import NUM_EXAMPLES, JaxStep, check_equal, torch_step
from pspinal_jax.benchmark.timing import Work
from pspinal_jax.models.preprocessing import normalisation
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.training.chunk import EpochPlan
from pspinal_jax.training.programs import make_order

OURS = "compiled epoch"
PUBLISHED = "PyTorch eager, DataLoader"
"""The published scripts' shape of work: every image a PIL image that a worker-less DataLoader turns into a tensor."""


def jax_epochs(recipe: Recipe, data: tuple[np.ndarray, np.ndarray]) -> dict[str, Work]:
    """Our epoch, from drawing its order to its last step: one compiled chunk, or a jitted step called from Python."""
    order = make_order(np.arange(NUM_EXAMPLES), NUM_EXAMPLES, vectorized=False)

    def epochs(steps: JaxStep, run: Callable[[int], None]) -> Work:
        def work(count: int) -> None:
            for epoch in range(count):
                drawn = order(steps.seed, np.int32(epoch))
                steps.plan = steps.programs.replicate(EpochPlan(drawn, steps.plan.learning_rates))
                run(steps.steps_per_epoch)
            jax.block_until_ready(steps.state)

        return work

    compiled, by_call = JaxStep(recipe, data), JaxStep(recipe, data)
    return {
        OURS: epochs(compiled, compiled.run),
        "jitted step, Python loop": epochs(by_call, by_call.run_one_by_one),
    }


def torch_epochs(recipe: Recipe, data: tuple[np.ndarray, np.ndarray], compiled: bool = True) -> dict[str, Work]:
    """PyTorch's: on tensors that lie on the device, eager and (if `compiled`) compiled, and through a DataLoader.

    Raises:
      ImportError: if torch is not installed.
    """
    import torch

    from pspinal_jax.benchmark.torch_twins import torch_device

    params = JaxStep(recipe, data).params
    size = recipe.batch_size

    def on_device(step: Callable[[Any], Any]) -> Work:
        def work(count: int) -> None:
            loss = None
            for _ in range(count):
                order = torch.randperm(NUM_EXAMPLES, device=torch_device())
                for start in range(0, NUM_EXAMPLES - size + 1, size):
                    loss = step(order[start : start + size])
            if loss is not None:
                float(loss.detach())

        return work

    work: dict[str, Work] = {}
    names = {"PyTorch eager": False} | ({"torch.compile": True} if compiled else {})
    for name, by_compiler in names.items():
        check_equal(recipe, data, by_compiler)
        step, _ = torch_step(recipe, data, params, by_compiler)
        work[name] = on_device(step)
    return work | {PUBLISHED: _published_shape(recipe, data, params)}


def _published_shape(recipe: Recipe, data: tuple[np.ndarray, np.ndarray], params: Any) -> Work:
    import torch
    from torch.nn import functional

    from pspinal_jax.benchmark.torch_twins import ImageExamples, torch_device

    images, labels = data
    examples = ImageExamples(images[..., 0], labels, *normalisation(recipe))
    loader = torch.utils.data.DataLoader(examples, recipe.batch_size, shuffle=True, drop_last=True)
    _, model = torch_step(recipe, data, params, compiled=False)
    optimizer = torch.optim.SGD(model.parameters(), recipe.optimizer.learning_rate, recipe.optimizer.momentum)
    device = torch_device()

    def work(count: int) -> None:
        loss = None
        for _ in range(count):
            for batch, targets in loader:
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(batch.to(device)), targets.to(device))
                loss.backward()
                optimizer.step()
        if loss is not None:
            float(loss.detach())

    return work
