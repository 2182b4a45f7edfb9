"""`benchmark step`: one training step of a 28x28 recipe, inside the compiled epoch and beside its peers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pspinal_jax.backbones.vgg5 import IMAGE_SHAPE, STAGES
from pspinal_jax.benchmark.head import Shape
from pspinal_jax.benchmark.timing import Work
from pspinal_jax.errors import RunError
from pspinal_jax.models.build import build_model
from pspinal_jax.models.preprocessing import normalisation, with_own_preprocessing
from pspinal_jax.recipes import load_recipe
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.programs import build_run_programs
from pspinal_jax.training.chunk import EpochPlan
from pspinal_jax.training.programs import make_order

OURS = "compiled epoch"
NUM_EXAMPLES = 60_000
_STEPS_COMPARED = 5
_TOLERANCE = 1e-3


def benchmark_recipe(name: str, batch_size: int | None = None, dtype: str = "float32") -> Recipe:
    """The recipe `name` without augmentation, which is measured by itself."""
    recipe = with_own_preprocessing(load_recipe(name))
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, augment="none"),
        batch_size=batch_size or recipe.batch_size,
        dtype=dtype,  # type: ignore[arg-type]
    )


def fake_data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [60000, 28, 28, 1] and labels: a step's time does not depend on what is in them."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (NUM_EXAMPLES, 28, 28, 1), np.uint8), rng.integers(0, 10, NUM_EXAMPLES, np.int32)


def step_flops(recipe: Recipe) -> int:
    """Floating-point operations of a step's matrix products and convolutions.

    Each is done three times, forward, for its kernel's gradient and for its input's, but the last not for the pixels.
    """
    config = recipe.model
    num_features = 784 if config.backbone == "none" else 256
    head = Shape(num_features, config.layer_width, config.num_layers, 10, recipe.batch_size)
    if config.backbone == "none":
        return head.flops - 2 * head.batch_size * 784 * (config.num_layers * config.layer_width + 10)
    products, side, fan_in, first = 0, 28, 1, 0
    for widths in STAGES:
        for width in widths:
            products += side * side * 9 * fan_in * width
            first = first or products
            fan_in = width
        side //= 2
    return head.flops + 2 * recipe.batch_size * (3 * products - first)


class JaxStep:
    """Our training step: inside the compiled epoch, and as a jitted step called from a Python loop."""

    def __init__(self, recipe: Recipe, data: tuple[np.ndarray, np.ndarray]) -> None:
        programs = build_run_programs(recipe, build_model(recipe, IMAGE_SHAPE, 10), IMAGE_SHAPE, np.uint8)
        self.programs = programs
        seeds = np.arange(recipe.num_seeds, dtype=np.uint32) if programs.vectorized else np.uint32(0)
        self.seed = programs.replicate(seeds)
        self.state = programs.init(self.seed)
        self.totals = programs.zero_totals(self.seed)
        order = make_order(np.arange(NUM_EXAMPLES), NUM_EXAMPLES, programs.vectorized)(self.seed, np.int32(0))
        steps = NUM_EXAMPLES // recipe.batch_size
        rates = np.full(steps, recipe.optimizer.learning_rate, np.float32)
        if programs.vectorized:
            rates = np.tile(rates, (recipe.num_seeds, 1))
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
    def params(self) -> Any:
        """The parameters, as the documented tree, copied to the host."""
        return jax.tree.map(np.array, self.state.params)


def torch_steps(
    recipe: Recipe, data: tuple[np.ndarray, np.ndarray], ours: JaxStep, compiled: bool = True, checked: bool = True
) -> dict[str, Work]:
    """The peers: eager PyTorch and torch.compile (if `compiled`), from our initial parameters.

    What both compute is compared first, at a dropout rate of 0, if `checked`.
    """
    import torch

    from pspinal_jax.benchmark.torch_twins import torch_device

    work: dict[str, Work] = {}
    names = {"PyTorch eager": False} | ({"torch.compile": True} if compiled else {})
    for name, by_compiler in names.items():
        if checked:
            check_equal(recipe, data, by_compiler)
        step, _ = torch_step(recipe, data, ours.params, by_compiler)
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


def torch_step(
    recipe: Recipe, data: tuple[np.ndarray, np.ndarray], params: Any, compiled: bool
) -> tuple[Callable[..., Any], Any]:
    """PyTorch's training step on the examples at given indices, from our initial `params`, and its model."""
    import torch

    from pspinal_jax.benchmark.torch_twins import (
        TorchClassifier,
        TorchProgressiveHead,
        TorchVGG5,
        computing_in,
        make_step,
        torch_device,
    )

    config, backbone, num_features = recipe.model, None, 784
    if config.backbone == "vgg5":
        backbone, num_features = TorchVGG5(), 256
        backbone.load(params["backbone"])
    head = TorchProgressiveHead(
        num_features, 10, config.layer_width, config.num_layers, config.dropout_rate, config.norm == "batch"
    )
    head.load(params["head"])
    device = torch_device()
    model = TorchClassifier(backbone, head).to(device).train()
    images = torch.from_numpy(data[0]).to(device)
    labels = torch.from_numpy(data[1].astype(np.int64)).to(device)
    optimizer = _torch_optimizer(recipe, model)
    forward = computing_in(recipe.dtype, model)
    return make_step(forward, optimizer, images, labels, *normalisation(recipe), compiled), model


def _torch_optimizer(recipe: Recipe, model: Any) -> Any:
    import torch

    config = recipe.optimizer
    if config.name == "sgd":
        return torch.optim.SGD(model.parameters(), config.learning_rate, config.momentum, fused=True)
    return torch.optim.Adam(model.parameters(), config.learning_rate, (config.momentum, 0.999), fused=True)


def check_equal(recipe: Recipe, data: tuple[np.ndarray, np.ndarray], compiled: bool) -> None:
    """In float32 and without dropout, the losses of the first steps must be the same on both sides.

    Every loss after the first depends on all updates before it. (Adam turns rounding into steps of full length where a
    gradient is zero, so parameters cannot be compared one by one, and its steps are kept small here.)

    Raises:
      RunError: if they are not: the timings would compare different work.
    """
    import torch

    from pspinal_jax.benchmark.torch_twins import torch_device

    largest = 1e-3 if recipe.optimizer.name == "sgd" else 1e-4
    slow = dataclasses.replace(recipe.optimizer, learning_rate=min(recipe.optimizer.learning_rate, largest))
    without_dropout = dataclasses.replace(recipe.model, dropout_rate=0.0)
    plain = dataclasses.replace(recipe, dtype="float32", model=without_dropout, optimizer=slow)
    ours = JaxStep(plain, data)
    step, _ = torch_step(plain, data, ours.params, compiled)
    order = torch.from_numpy(np.array(ours.plan.order)).long().to(torch_device())
    size = recipe.batch_size
    theirs = [float(step(order[index * size : (index + 1) * size]).detach()) for index in range(_STEPS_COMPARED)]
    ours.run(_STEPS_COMPARED)
    mean = float(ours.totals.loss) / (_STEPS_COMPARED * size)
    difference = abs(np.mean(theirs) - mean) / mean
    if not difference <= _TOLERANCE:
        raise RunError(f"benchmark: PyTorch's loss differs from ours by a part of {difference:.1e} after 5 steps")
