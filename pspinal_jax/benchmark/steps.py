"""Training steps of a recipe: inside the compiled epoch and as `train` takes them, beside PyTorch's; whole epochs too.

All 60,000 images of 28x28 lie on the device, and of photographs a batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.augment import augment
from pspinal_jax.benchmark.timing import (
    EAGER,
    MODES,
    Case,
    Entry,
    Precision,
    Settings,
    Work,
    calls,
    count_flops,
    has_torch,
    layer_dtype,
    looped,
    table,
    timed,
    torch_device,
)
from pspinal_jax.environment import convolution_options, jit_with
from pspinal_jax.errors import RunError
from pspinal_jax.models import build_model, normalisation, with_default_preprocessing
from pspinal_jax.recipes import load_recipe
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.build import build_run_programs
from pspinal_jax.training.keys import make_order
from pspinal_jax.training.step import EpochPlan

EPOCH, CALL, BATCH = "compiled epoch", "jitted step, Python loop", "jitted step"
PUBLISHED = "PyTorch eager, DataLoader"
"""The published scripts' shape of work: every image a PIL image that a worker-less DataLoader turns into a tensor."""
_NUM_EXAMPLES = 60_000
_TOLERANCE = 1e-3


class Data(NamedTuple):
    """Images uint8 [N, H, W, C], their labels int32 [N] and the number of classes."""

    images: np.ndarray
    labels: np.ndarray
    num_classes: int


def benchmark_recipe(
    name: str, batch_size: int | None = None, dtype: str = "float32", backbone: str | None = None, side: int = 0
) -> Recipe:
    """The recipe `name` without augmentation, which is measured by itself, and perhaps with another backbone."""
    recipe = with_default_preprocessing(load_recipe(name))
    data, model = dataclasses.replace(recipe.data, augment="none"), recipe.model
    if side:
        data = dataclasses.replace(data, image_size=side)
    if backbone:
        model = dataclasses.replace(model, backbone=backbone, weights=None)  # type: ignore[arg-type]
    batch_size = batch_size or recipe.batch_size
    return dataclasses.replace(recipe, data=data, model=model, batch_size=batch_size, dtype=dtype)  # type: ignore[arg-type]


def fake_data(recipe: Recipe, seed: int = 0) -> Data:
    """Random data of the recipe's shape: a step's time does not depend on what is in it."""
    rng = np.random.default_rng(seed)
    count, shape, num_classes = _NUM_EXAMPLES, (28, 28, 1), 10
    if _takes_batches(recipe):
        count, shape, num_classes = recipe.batch_size, (recipe.data.side, recipe.data.side, 3), 101
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    return Data(images, rng.integers(0, num_classes, count, np.int32), num_classes)


def _takes_batches(recipe: Recipe) -> bool:
    return recipe.data.image_size is not None


def step_flops(recipe: Recipe, data: Data) -> int:
    """Operations of a step's products and convolutions: three times those of the forward pass.

    Without the pixels' gradient, which nobody computes, where the head reads them; a backbone's first layer is 1 % of
    all at most, and counted.
    """
    shape, config = data.images.shape[1:], recipe.model
    model = build_model(recipe, shape, data.num_classes)
    images = jax.ShapeDtypeStruct((recipe.batch_size, *shape), np.uint8)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    flops = 3 * count_flops(partial(model.apply, train=False), variables, images)
    if config.backbone == "none":
        outputs = config.num_layers * config.layer_width + data.num_classes
        flops -= 2 * recipe.batch_size * int(np.prod(shape)) * outputs
    return flops


class Steps:
    """Our training step, its programs and its state: on data in memory, or on one batch of photographs."""

    def __init__(self, recipe: Recipe, data: Data) -> None:
        shape, count = data.images.shape[1:], len(data.labels)
        self.programs = build_run_programs(recipe, build_model(recipe, shape, data.num_classes), shape, np.uint8)
        vectorized, self._streams = self.programs.vectorized, _takes_batches(recipe)
        seeds = np.arange(recipe.num_seeds, dtype=np.uint32)
        self.seed = self.programs.replicate(seeds if vectorized else seeds[0])
        self.state, self.totals = self.programs.init(self.seed), self.programs.zero_totals(self.seed)
        self.num_steps = count // recipe.batch_size
        self._draw_order = make_order(np.arange(count), count, vectorized, shuffle=not self._streams)
        rates = np.full(self.num_steps, recipe.optimizer.learning_rate, np.float32)
        self._rates = np.tile(rates, (recipe.num_seeds, 1)) if vectorized else rates
        place = self.programs.shard_batch if self._streams else self.programs.replicate
        self._data = place((data.images, data.labels))
        self.begin_epoch(0)

    def begin_epoch(self, number: int) -> None:
        """Draw the order of epoch `number`."""
        self.order = self._draw_order(self.seed, np.int32(number))
        self._plan = self.programs.replicate(EpochPlan(self.order, self._rates))

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters, as the documented tree, and running statistics, copied to the host."""
        return jax.tree.map(np.array, {"params": self.state.params, "batch_stats": self.state.batch_stats})

    def run(self, num_steps: int) -> None:
        """`num_steps` steps in compiled chunks of up to an epoch; returns when they are done."""
        for start in range(0, num_steps, self.num_steps):
            self._advance(0, min(num_steps - start, self.num_steps))
        jax.block_until_ready(self.state)

    def run_one_by_one(self, num_steps: int) -> None:
        """The same steps, each a call of its own; on photographs it is the one that `train` makes for a batch."""
        for index in range(num_steps):
            self._advance(index % self.num_steps, 1)
        jax.block_until_ready(self.state)

    def _advance(self, first: int, count: int) -> None:
        sums, programs = (self.state, self.totals, self.seed), self.programs
        if self._streams:
            self.state, self.totals = programs.batch_step(*sums, self._rates[0], self._data)
        else:
            self.state, self.totals = programs.chunk(*sums, self._plan, np.int32(first), np.int32(count), self._data)


def our_steps(recipe: Recipe, data: Data) -> tuple[dict[str, Work], dict[str, Any]]:
    """Ways to run our step, by name, and the variables that they start from."""
    by_call = Steps(recipe, data)
    if _takes_batches(recipe):
        return {BATCH: by_call.run_one_by_one}, by_call.variables
    epoch = Steps(recipe, data)
    return {EPOCH: epoch.run, CALL: by_call.run_one_by_one}, epoch.variables


def torch_steps(recipe: Recipe, data: Data, variables: dict[str, Any], modes: Sequence[str]) -> dict[str, Work]:
    """PyTorch's step in each of `modes`, from our initial variables; every epoch has an order of its own."""
    import torch

    from pspinal_jax.benchmark.torch_reference import recipe_step, repeated

    size, device = recipe.batch_size, torch_device()
    num_steps = len(data.labels) // size
    order = torch.arange(len(data.labels), device=device)

    def rows(index: int) -> Any:
        nonlocal order
        order = torch.randperm(len(order), device=device) if index % num_steps == 0 else order
        return order[index % num_steps * size :][:size]

    return {mode: repeated(recipe_step(recipe, data, variables, mode)[0], rows) for mode in modes}


def check_equal(recipe: Recipe, data: Data, modes: Sequence[str]) -> None:
    """In float32 and without dropout, the losses of the first steps must be the same on both sides.

    Every loss after the first depends on all updates before it. (Adam turns rounding into steps of full length where a
    gradient is zero, so parameters cannot be compared one by one, and steps are kept small; smaller still through a
    deep network of random weights, which multiplies every rounding.)

    Raises:
      RunError: if they are not: the timings would compare different work.
    """
    count, largest = (3, 1e-5) if _takes_batches(recipe) else (5, 1e-3 if recipe.optimizer.name == "sgd" else 1e-4)
    optimizer = dataclasses.replace(recipe.optimizer, learning_rate=min(recipe.optimizer.learning_rate, largest))
    model = dataclasses.replace(recipe.model, dropout_rate=0.0)
    plain, size = dataclasses.replace(recipe, dtype="float32", model=model, optimizer=optimizer), recipe.batch_size
    for mode in modes:
        import torch

        from pspinal_jax.benchmark.torch_reference import recipe_step

        ours = Steps(plain, data)
        step, _ = recipe_step(plain, data, ours.variables, mode)
        order = torch.from_numpy(np.array(ours.order)).long().to(torch_device())
        losses = [float(step(order[index * size % len(order) :][:size]).detach()) for index in range(count)]
        ours.run_one_by_one(count)
        mean = float(ours.totals.loss) / (count * size)
        difference = abs(np.mean(losses) - mean) / mean
        if not difference <= _TOLERANCE:
            raise RunError(f"benchmark: {mode}'s loss differs from ours by {difference:.1e} of it after {count} steps")


def step(settings: Settings, recipe: str = "mnist-paper", batch_size: int | None = None) -> list[Case]:
    """One training step of a shipped recipe."""
    return _step_cases(settings, partial(benchmark_recipe, recipe, batch_size), recipe)


def _step_cases(settings: Settings, recipe_in: Callable[[str], Recipe], name: str) -> list[Case]:
    recipe = recipe_in("float32")
    data, photographs = fake_data(recipe), _takes_batches(recipe)
    convolves_long = recipe.model.backbone != "none" and (photographs or jax.default_backend() == "cpu")
    modes = (MODES[:1] if settings.quick and convolves_long else MODES) if has_torch() else ()

    def case(precision: Precision) -> Entry:
        recipe = recipe_in(layer_dtype(precision))
        work, variables = our_steps(recipe, data)
        work |= torch_steps(recipe, data, variables, modes) if modes else {}
        title = f"one training step of {name}, batch {recipe.batch_size}, {precision}"
        return timed(title, work, step_flops(recipe, data), precision, settings, examples=recipe.batch_size)

    check = [] if settings.quick and photographs else [Case("same losses", partial(check_equal, recipe, data, modes))]
    return check + [Case(precision, partial(case, precision), precision) for precision in settings.precisions]


def _backbone(backbone: str, settings: Settings) -> list[Case]:
    """One training step of a backbone and the head on photographs, and the features alone."""
    batch, side = settings.image_batch, settings.image_side
    recipe_in = partial(benchmark_recipe, "caltech101-paper", batch, backbone=backbone, side=side)
    what = f"{backbone}, {side} pixels"
    # Full float32 on a GPU runs beside the matrix units, which nobody trains images with; it comes last.
    settings = dataclasses.replace(settings, precisions=tuple(reversed(settings.precisions)))

    def features(precision: Precision) -> Entry:
        recipe = recipe_in(dtype=layer_dtype(precision))
        work, flops = feature_passes(recipe, fake_data(recipe))
        title = f"features of {what}, batch {batch}, {precision}"
        return timed(title, work, flops, precision, settings, examples=batch)

    passes = [Case(f"features, {name}", partial(features, name), name) for name in settings.precisions[:2]]
    steps = _step_cases(settings, lambda dtype: recipe_in(dtype=dtype), what)
    return [*steps[:2], *passes, *steps[2:]]


efficientnet_lite0, resnet50, wide_resnet101_2 = (
    partial(_backbone, name) for name in ("efficientnet_lite0", "resnet50", "wide_resnet101_2")
)


def feature_passes(recipe: Recipe, data: Data) -> tuple[dict[str, Work], int]:
    """The backbone's features of a batch without training, ours and eager PyTorch's; operations of a pass.

    PyTorch's side has parameters of its own: the time does not depend on them.
    """
    model = build_model(recipe, data.images.shape[1:], data.num_classes)
    images = jnp.asarray(data.images)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images)
    features = partial(model.apply, train=False, method="features")
    call = jit_with(convolution_options(jax.default_backend()), features)
    work: dict[str, Work] = {"jitted features": calls(call, variables, images)}
    if has_torch():
        from pspinal_jax.benchmark.torch_reference import backbone_features

        work[EAGER] = backbone_features(recipe, data)
    return work, count_flops(features, variables, images)


def vgg5(settings: Settings) -> list[Case]:
    """An epoch of the KMNIST row, VGG-5 and head, with and without augmentation, and one training step."""
    data, steps = fake_data(benchmark_recipe("kmnist-paper")), settings.vgg5_steps

    def epoch_of(recipe: Recipe) -> Work:
        run = Steps(recipe, data).run
        return lambda count: run(count * steps)

    def case(precision: Precision) -> Entry:
        dtype = layer_dtype(precision)
        plain = benchmark_recipe("kmnist-paper", dtype=dtype)
        augmented = dataclasses.replace(load_recipe("kmnist-paper"), dtype=dtype)
        work = {f"{EPOCH}, augmented": epoch_of(augmented), f"{EPOCH}, not augmented": epoch_of(plain)}
        title, flops = f"{steps} steps of kmnist-paper in one program, {precision}", steps * step_flops(plain, data)
        return timed(title, work, flops, precision, settings, examples=64 * steps, rounds=3, warm=False)

    epochs = [Case(f"epoch, {precision}", partial(case, precision), precision) for precision in settings.precisions]
    return epochs + step(settings, "kmnist-paper")


def seeds(settings: Settings) -> list[Case]:
    """Several seeds of the MNIST row as one program."""
    data = fake_data(benchmark_recipe("mnist-paper"))
    base: dict[str, float] = {}

    def case(count: int, precision: Precision) -> Entry:
        recipe = benchmark_recipe("mnist-paper", dtype=layer_dtype(precision))
        recipe = dataclasses.replace(recipe, num_seeds=count, seed_mode="vmap" if count > 1 else "loop")
        timing = settings.time(Steps(recipe, data).run)
        rate = count * recipe.batch_size / timing.median
        row = {"seeds": count, "ms a step of all": 1e3 * timing.median, "examples/s": round(rate)}
        row |= {"times one seed's rate": rate / base.setdefault(precision, rate), "first call s": timing.first_call}
        title = f"Seeds as one program, mnist-paper, batch 64, {precision}"
        return table(title, [row], {"examples/s": {f"{count} seeds": [rate]}})

    return [
        Case(f"{count} seeds, {precision}", partial(case, count, precision), precision)
        for precision in settings.precisions[-2:]
        for count in settings.seeds
    ]


def epoch(settings: Settings) -> list[Case]:
    """A whole epoch of the MNIST row, data handling included."""
    recipe = benchmark_recipe("mnist-paper")
    data = fake_data(recipe)
    modes = (MODES[:1] if settings.quick else MODES) if has_torch() else ()

    def case(precision: Precision) -> Entry:
        work = our_epochs(recipe, data) | (torch_epochs(recipe, data, modes) if modes else {})
        steps, size = len(data.labels) // recipe.batch_size, recipe.batch_size
        title = f"an epoch of mnist-paper, {len(data.labels)} images, batch {size}, {precision}"
        how: dict[str, Any] = {"rounds": min(2, settings.rounds), "warm": False} if settings.quick else {}
        return timed(title, work, steps * step_flops(recipe, data), precision, settings, examples=steps * size, **how)

    precision = settings.precisions[0]
    check = Case("same losses", partial(check_equal, recipe, data, modes))
    return [check, Case(precision, partial(case, precision), precision)]


def our_epochs(recipe: Recipe, data: Data) -> dict[str, Work]:
    """Our epoch, from drawing its order to its last step: one compiled chunk, or a jitted step called from Python."""

    def epochs(steps: Steps, run: Callable[[int], None], count: int) -> None:
        for number in range(count):
            steps.begin_epoch(number)
            run(steps.num_steps)

    compiled, by_call = Steps(recipe, data), Steps(recipe, data)
    return {EPOCH: partial(epochs, compiled, compiled.run), CALL: partial(epochs, by_call, by_call.run_one_by_one)}


def torch_epochs(recipe: Recipe, data: Data, modes: Sequence[str]) -> dict[str, Work]:
    """PyTorch's epochs: on tensors on the device, in each of `modes`, and through a DataLoader."""
    import torch

    from pspinal_jax.benchmark.torch_reference import ImageExamples, published_epoch, recipe_step

    variables, size = Steps(recipe, data).variables, recipe.batch_size
    num_steps = len(data.labels) // size
    examples = ImageExamples(data.images[..., 0], data.labels, *normalisation(recipe))
    loader = torch.utils.data.DataLoader(examples, size, shuffle=True, drop_last=True)
    model = recipe_step(recipe, data, variables, EAGER)[1]
    optimizer = torch.optim.SGD(model.parameters(), recipe.optimizer.learning_rate, recipe.optimizer.momentum)

    def published(count: int) -> None:
        for _ in range(count):
            published_epoch(model, optimizer, loader)

    steps = torch_steps(recipe, data, variables, modes)
    work: dict[str, Work] = {mode: lambda count, mode=mode: steps[mode](count * num_steps) for mode in modes}  # type: ignore[misc]
    return {**work, PUBLISHED: published}


def augmentation(settings: Settings) -> list[Case]:
    """Perspective and rotation of 28x28 images inside a compiled loop, by batch size."""

    def case(batch: int) -> Entry:
        images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, 28, 28, 1), np.uint8))

        def body(index: jax.Array, images: jax.Array) -> jax.Array:
            return augment(jax.random.fold_in(jax.random.key(0), index), images)

        timing = settings.time(looped(body, images))
        row = {"batch": batch, "ms": 1e3 * timing.median, "images/s": round(batch / timing.median)}
        bars = {"images/s": {f"batch {batch}": (batch / timing.seconds).tolist()}}
        return table("Perspective and rotation of 28x28 images", [row], bars)

    return [Case(f"batch {batch}", partial(case, batch)) for batch in (64, 1024)]
