"""`benchmark step`: one training step of the MNIST row's recipe, inside the compiled epoch and beside its peers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pspinal_jax.benchmark.timing import Work
from pspinal_jax.errors import RunError
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.setup import build_run_programs
from pspinal_jax.training.chunk import EpochPlan
from pspinal_jax.training.programs import make_order

OURS = "compiled epoch"
NUM_EXAMPLES = 60_000
_STEPS_COMPARED = 5
_TOLERANCE = 1e-3


def fake_data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [60000, 28, 28, 1] and labels: a step's time does not depend on what is in them."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (NUM_EXAMPLES, 28, 28, 1), np.uint8), rng.integers(0, 10, NUM_EXAMPLES, np.int32)


class JaxStep:
    """Our training step: inside the compiled epoch, and as a jitted step called from a Python loop."""

    def __init__(self, recipe: Recipe, data: tuple[np.ndarray, np.ndarray]) -> None:
        _, programs = build_run_programs(recipe, (28, 28, 1), np.uint8, 10)
        self.programs = programs
        self.seed = programs.replicate(np.uint32(0))
        self.state = programs.init(self.seed)
        self.totals = programs.zero_totals(self.seed)
        order = make_order(np.arange(NUM_EXAMPLES), NUM_EXAMPLES, vectorized=False)(self.seed, np.int32(0))
        steps = NUM_EXAMPLES // recipe.batch_size
        rates = np.full(steps, recipe.optimizer.learning_rate, np.float32)
        self.plan = programs.replicate(EpochPlan(order, rates))
        self.data = programs.replicate(data)
        self.steps_per_epoch = steps

    def run(self, num_steps: int) -> None:
        """`num_steps` steps in compiled chunks of up to an epoch; returns when they are done."""
        while num_steps > 0:
            here = min(num_steps, self.steps_per_epoch)
            self._advance(0, here)
            num_steps -= here
        jax.block_until_ready(self.state)

    def run_one_by_one(self, num_steps: int) -> None:
        """The same steps, each a call of its own."""
        for index in range(num_steps):
            self._advance(index % self.steps_per_epoch, 1)
        jax.block_until_ready(self.state)

    def _advance(self, first: int, count: int) -> None:
        self.state, self.totals = self.programs.chunk(
            self.state, self.totals, self.seed, self.plan, np.int32(first), np.int32(count), self.data
        )

    @property
    def head_params(self) -> Any:
        """Parameters of the head, as the documented tree, copied to the host."""
        return jax.tree.map(np.array, self.state.params["head"])


def torch_steps(recipe: Recipe, data: tuple[np.ndarray, np.ndarray], ours: JaxStep) -> dict[str, Work]:
    """The peers: eager PyTorch and torch.compile, from our initial parameters, after a check of equality at p = 0."""
    import torch

    from pspinal_jax.benchmark.torch_peer import torch_device

    work: dict[str, Work] = {}
    for name, compiled in (("PyTorch eager", False), ("torch.compile", True)):
        _check_equal(recipe, data, compiled)
        step, _ = _torch_step(recipe, data, ours.head_params, compiled)
        order = torch.randperm(NUM_EXAMPLES, device=torch_device())

        def run(num_steps: int, step: Callable[..., Any] = step, order: Any = order) -> None:
            size, loss = recipe.batch_size, None
            for index in range(num_steps):
                start = (index * size) % (NUM_EXAMPLES - size)
                loss = step(order[start : start + size])
            if loss is not None:
                float(loss.detach())  # waits for the device

        work[name] = run
    return work


def _torch_step(
    recipe: Recipe, data: tuple[np.ndarray, np.ndarray], params: Any, compiled: bool
) -> tuple[Callable[..., Any], Any]:
    import torch

    from pspinal_jax.benchmark.torch_peer import TorchProgressiveHead, make_step, torch_device

    device = torch_device()
    model = TorchProgressiveHead(
        784,
        10,
        recipe.model.layer_width,
        recipe.model.num_layers,
        recipe.model.dropout_rate,
        recipe.model.norm == "batch",
    )
    model.load(params)
    model = model.to(device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.optimizer.learning_rate, recipe.optimizer.momentum, fused=True
    )
    images = torch.from_numpy(data[0].reshape(NUM_EXAMPLES, 784)).to(device)
    labels = torch.from_numpy(data[1].astype(np.int64)).to(device)
    step = make_step(model, optimizer, images, labels, recipe.data.mean, recipe.data.std, compiled)
    return step, model


def _check_equal(recipe: Recipe, data: tuple[np.ndarray, np.ndarray], compiled: bool) -> None:
    """Five steps without dropout must lead to the same parameters on both sides.

    Raises:
      RunError: if they do not: the timings would compare different work.
    """
    import torch

    from pspinal_jax.benchmark.torch_peer import torch_device

    plain = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dropout_rate=0.0))
    ours = JaxStep(plain, data)
    step, model = _torch_step(plain, data, ours.head_params, compiled)
    order = torch.from_numpy(np.array(ours.plan.order)).long().to(torch_device())
    size = recipe.batch_size
    for index in range(_STEPS_COMPARED):
        step(order[index * size : (index + 1) * size])
    ours.run(_STEPS_COMPARED)
    params = ours.head_params
    pairs = [(model.output.weight, params["output"]["kernel"]), (model.layers[-1].weight, params["layer_4"]["kernel"])]
    for theirs, kernel in pairs:
        difference = np.abs(theirs.detach().cpu().numpy().T - kernel).max() / np.abs(kernel).max()
        if difference > _TOLERANCE:
            raise RunError(f"benchmark: PyTorch's parameters differ from ours by {difference:.1e} after 5 steps")
