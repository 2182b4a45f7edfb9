"""`benchmark step` for a recipe of images: one training step on images that lie on the device."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.benchmark.roofline import count_flops
from pspinal_jax.benchmark.timing import Work
from pspinal_jax.environment import convolution_options, jit_with
from pspinal_jax.errors import RunError
from pspinal_jax.models.build import build_model
from pspinal_jax.models.preprocessing import normalisation
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.programs import build_run_programs

OURS = "jitted step"
"""What `train` calls for every batch that it reads."""
NUM_CLASSES = 101
_STEPS_COMPARED = 3
_TOLERANCE = 1e-3

Batch = tuple[np.ndarray, np.ndarray]


def fake_images(recipe: Recipe, seed: int = 0) -> Batch:
    """A batch of the recipe's size, images uint8 [B, H, W, 3] and labels: a step's time does not depend on them."""
    rng, side = np.random.default_rng(seed), recipe.data.side
    images = rng.integers(0, 256, (recipe.batch_size, side, side, 3), np.uint8)
    return images, rng.integers(0, NUM_CLASSES, recipe.batch_size, np.int32)


def image_step_flops(recipe: Recipe) -> int:
    """Operations of a step's products and convolutions: three times those of the forward pass.

    The images' own gradient, which nobody computes, is 1 % of that and counted.
    """
    side = recipe.data.side
    model = build_model(recipe, (side, side, 3), NUM_CLASSES)
    images = jax.ShapeDtypeStruct((recipe.batch_size, side, side, 3), np.uint8)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    return 3 * count_flops(partial(model.apply, train=False), variables, images)


class ImageStep:
    """Our training step on one batch, as `train` takes it."""

    def __init__(self, recipe: Recipe, batch: Batch) -> None:
        shape = batch[0].shape[1:]
        self._programs = build_run_programs(recipe, build_model(recipe, shape, NUM_CLASSES), shape, np.uint8)
        self._seed = self._programs.replicate(np.uint32(0))
        self._rate = self._programs.replicate(np.float32(recipe.optimizer.learning_rate))
        self._batch = self._programs.shard_batch(batch)
        self.state = self._programs.init(self._seed)
        self.totals = self._programs.zero_totals(self._seed)

    def run(self, num_steps: int) -> None:
        """`num_steps` steps; returns when they are done."""
        for _ in range(num_steps):
            self.state, self.totals = self._programs.batch_step(
                self.state, self.totals, self._seed, self._rate, self._batch
            )
        jax.block_until_ready(self.state)

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters and running statistics, copied to the host."""
        return jax.tree.map(np.array, {"params": self.state.params, "batch_stats": self.state.batch_stats})


def torch_image_steps(
    recipe: Recipe, batch: Batch, ours: ImageStep, compiled: bool = True, checked: bool = True
) -> dict[str, Work]:
    """The peers, eager PyTorch and torch.compile (if `compiled`), channels last, from our variables.

    What both compute is compared first, if `checked`.

    Raises:
      ImportError: if torch is not installed.
      RunError: if they compute something else.
    """
    work: dict[str, Work] = {}
    if checked:
        check_equal(recipe, batch)
    names = {"PyTorch eager, channels last": False} | ({"torch.compile, channels last": True} if compiled else {})
    for name, by_compiler in names.items():
        step = _torch_step(recipe, batch, ours.variables, by_compiler)

        def run(num_steps: int, step: Any = step) -> None:
            loss = None
            for _ in range(num_steps):
                loss = step()
            if loss is not None:
                float(loss.detach())  # waits for the device

        work[name] = run
    return work


def feature_passes(recipe: Recipe, batch: Batch, peers: bool) -> tuple[dict[str, Work], int]:
    """The backbone's features of `batch` without training, ours and (if `peers`) eager PyTorch's; operations of a pass.

    PyTorch's side has parameters of its own: the time does not depend on them.
    """
    model = build_model(recipe, batch[0].shape[1:], NUM_CLASSES)
    images = jnp.asarray(batch[0])
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images)
    features = partial(model.apply, train=False, method="features")
    call = jit_with(convolution_options(jax.default_backend()), features)

    def ours(count: int) -> None:
        result = None
        for _ in range(count):
            result = call(variables, images)
        jax.block_until_ready(result)

    work: dict[str, Work] = {"jitted features": ours}
    if peers:
        work["PyTorch eager, channels last"] = _torch_features(recipe, batch)
    return work, count_flops(features, variables, images)


def _torch_features(recipe: Recipe, batch: Batch) -> Work:
    import torch

    from pspinal_jax.benchmark.torch_twins import (
        VARIANTS,
        TorchEfficientNetLite,
        TorchResNet,
        computing_in,
        torch_device,
    )

    name = recipe.model.backbone
    backbone = TorchEfficientNetLite(name) if name.startswith("efficientnet") else TorchResNet(*VARIANTS[name])
    backbone = backbone.to(torch_device(), memory_format=torch.channels_last).eval()
    images = torch.from_numpy(batch[0]).to(torch_device())
    forward = computing_in(recipe.dtype, backbone)

    def run(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                result = forward((images.float() / 255).permute(0, 3, 1, 2))
            float(result[0, 0])  # waits for the device

    return run


def _torch_step(recipe: Recipe, batch: Batch, variables: dict[str, Any], compiled: bool) -> Any:
    import torch

    from pspinal_jax.benchmark.torch_twins import (
        TorchClassifier,
        TorchEfficientNetLite,
        TorchProgressiveHead,
        computing_in,
        make_step,
        torch_device,
        torch_resnet,
    )
    from pspinal_jax.weights import resnet_state_dict  # loads safetensors, which not every benchmark needs

    config, device = recipe.model, torch_device()
    own = {name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree}
    if config.backbone.startswith("efficientnet"):
        backbone = TorchEfficientNetLite(config.backbone)
        backbone.load(own["params"])
    else:
        backbone = torch_resnet(config.backbone, resnet_state_dict(own, config.backbone))
    head = TorchProgressiveHead(
        backbone.num_features, NUM_CLASSES, config.layer_width, config.num_layers, config.dropout_rate
    )
    head.load(variables["params"]["head"])
    model = TorchClassifier(backbone, head).to(device).train()
    images, labels = torch.from_numpy(batch[0]).to(device), torch.from_numpy(batch[1].astype(np.int64)).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.optimizer.learning_rate, recipe.optimizer.momentum, fused=True
    )

    step = make_step(computing_in(recipe.dtype, model), optimizer, images, labels, *normalisation(recipe), compiled)
    return partial(step, torch.arange(len(labels), device=device))


def check_equal(recipe: Recipe, batch: Batch) -> None:
    """In float32 and without dropout the losses of the first steps must be the same on both sides.

    With small steps: a deep network of random weights multiplies every rounding.

    Raises:
      RunError: if they are not: the timings would compare different work.
    """
    plain = dataclasses.replace(
        recipe,
        dtype="float32",
        model=dataclasses.replace(recipe.model, dropout_rate=0.0),
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=1e-5),
    )
    ours = ImageStep(plain, batch)
    step = _torch_step(plain, batch, ours.variables, compiled=False)
    theirs = np.mean([float(step().detach()) for _ in range(_STEPS_COMPARED)])
    ours.run(_STEPS_COMPARED)
    mean = float(ours.totals.loss) / (_STEPS_COMPARED * recipe.batch_size)
    difference = abs(theirs - mean) / mean
    if not difference <= _TOLERANCE:
        raise RunError(f"benchmark: PyTorch's loss differs from ours by a part of {difference:.1e} after 3 steps")
