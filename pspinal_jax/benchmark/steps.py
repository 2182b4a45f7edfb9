"""Training steps of a recipe: inside the compiled epoch and as `train` takes them, beside PyTorch's; whole epochs too.

All 60,000 images of 28x28 lie on the device, and of photographs a batch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.augment import augment
from pspinal_jax.benchmark.timing import (
    Case,
    Entry,
    Precision,
    Settings,
    Work,
    calls,
    checked,
    count_flops,
    has_torch,
    in_precisions,
    layer_dtype,
    set_precision,
    table,
    time_interleaved,
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


class Step:
    """Our training step: its programs and its state."""

    def __init__(self, recipe: Recipe, data: Data) -> None:
        shape = data.images.shape[1:]
        model = build_model(recipe, shape, data.num_classes)
        self.programs = build_run_programs(recipe, model, shape, np.uint8)
        seeds = np.arange(recipe.num_seeds, dtype=np.uint32) if self.programs.vectorized else np.uint32(0)
        self.seed = self.programs.replicate(seeds)
        self.state = self.programs.init(self.seed)
        self.totals = self.programs.zero_totals(self.seed)

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters, as the documented tree, and running statistics, copied to the host."""
        return jax.tree.map(np.array, {"params": self.state.params, "batch_stats": self.state.batch_stats})


class EpochStep(Step):
    """Steps on data in memory, in compiled chunks of an epoch or one by one."""

    def __init__(self, recipe: Recipe, data: Data) -> None:
        super().__init__(recipe, data)
        count, vectorized = len(data.labels), self.programs.vectorized
        self.num_steps = count // recipe.batch_size
        self._draw_order = make_order(np.arange(count), count, vectorized)
        rates = np.full(self.num_steps, recipe.optimizer.learning_rate, np.float32)
        self._rates = np.tile(rates, (recipe.num_seeds, 1)) if vectorized else rates
        self._data = self.programs.replicate((data.images, data.labels))
        self.begin_epoch(0)

    def begin_epoch(self, number: int) -> None:
        """Draw the order of epoch `number`."""
        self.order = self._draw_order(self.seed, np.int32(number))
        self._plan = self.programs.replicate(EpochPlan(self.order, self._rates))

    def run(self, num_steps: int) -> None:
        """`num_steps` steps in compiled chunks of up to an epoch; returns when they are done."""
        for start in range(0, num_steps, self.num_steps):
            self._advance(0, min(num_steps - start, self.num_steps))
        jax.block_until_ready(self.state)

    def run_one_by_one(self, num_steps: int) -> None:
        """The same steps, each a call of its own."""
        for index in range(num_steps):
            self._advance(index % self.num_steps, 1)
        jax.block_until_ready(self.state)

    def _advance(self, first: int, count: int) -> None:
        self.state, self.totals = self.programs.chunk(
            self.state, self.totals, self.seed, self._plan, np.int32(first), np.int32(count), self._data
        )


class BatchStep(Step):
    """Steps on one batch, each the call that `train` makes for every batch it reads."""

    def __init__(self, recipe: Recipe, data: Data) -> None:
        super().__init__(recipe, data)
        self.order = np.arange(recipe.batch_size)
        self._rate = self.programs.replicate(np.float32(recipe.optimizer.learning_rate))
        self._batch = self.programs.shard_batch((data.images, data.labels))

    def run(self, num_steps: int) -> None:
        """`num_steps` steps; returns when they are done."""
        for _ in range(num_steps):
            self.state, self.totals = self.programs.batch_step(
                self.state, self.totals, self.seed, self._rate, self._batch
            )
        jax.block_until_ready(self.state)


def our_steps(recipe: Recipe, data: Data) -> tuple[dict[str, Work], dict[str, Any]]:
    """Ways to run our step, by name, and the variables that they start from."""
    if _takes_batches(recipe):
        batch = BatchStep(recipe, data)
        return {BATCH: batch.run}, batch.variables
    epoch, by_call = EpochStep(recipe, data), EpochStep(recipe, data)
    return {EPOCH: epoch.run, CALL: by_call.run_one_by_one}, epoch.variables


def torch_steps(recipe: Recipe, data: Data, variables: dict[str, Any], modes: list[str]) -> dict[str, Work]:
    """PyTorch's step in each of `modes`, from our initial variables."""
    import torch

    from pspinal_jax.benchmark.torch_reference import recipe_step, repeated

    size, last = recipe.batch_size, max(1, len(data.labels) - recipe.batch_size)
    order = torch.randperm(len(data.labels), device=torch_device())

    def rows(index: int) -> Any:
        start = index * size % last
        return order[start : start + size]

    return {mode: repeated(recipe_step(recipe, data, variables, mode)[0], rows) for mode in modes}


def _torch_modes(recipe: Recipe, settings: Settings) -> list[str]:
    if not has_torch():
        return []
    from pspinal_jax.benchmark.torch_reference import EAGER, MODES

    convolves_long = recipe.model.backbone != "none" and (_takes_batches(recipe) or jax.default_backend() == "cpu")
    return [EAGER] if settings.quick and convolves_long else list(MODES)


def check_equal(recipe: Recipe, data: Data, mode: str) -> None:
    """In float32 and without dropout, the losses of the first steps must be the same on both sides.

    Every loss after the first depends on all updates before it. (Adam turns rounding into steps of full length where a
    gradient is zero, so parameters cannot be compared one by one, and steps are kept small; smaller still through a
    deep network of random weights, which multiplies every rounding.)

    Raises:
      RunError: if they are not: the timings would compare different work.
    """
    import torch

    from pspinal_jax.benchmark.torch_reference import recipe_step

    set_precision("float32")
    count, largest = (3, 1e-5) if _takes_batches(recipe) else (5, 1e-3 if recipe.optimizer.name == "sgd" else 1e-4)
    optimizer = dataclasses.replace(recipe.optimizer, learning_rate=min(recipe.optimizer.learning_rate, largest))
    model = dataclasses.replace(recipe.model, dropout_rate=0.0)
    plain = dataclasses.replace(recipe, dtype="float32", model=model, optimizer=optimizer)
    ours = (BatchStep if _takes_batches(plain) else EpochStep)(plain, data)
    step, _ = recipe_step(plain, data, ours.variables, mode)
    order, size = torch.from_numpy(np.array(ours.order)).long().to(torch_device()), recipe.batch_size
    rows = [order[index * size % len(order) :][:size] for index in range(count)]
    theirs = np.mean([float(step(batch).detach()) for batch in rows])
    ours.run(count)
    mean = float(ours.totals.loss) / (count * size)
    difference = abs(theirs - mean) / mean
    if not difference <= _TOLERANCE:
        raise RunError(f"benchmark: PyTorch's loss differs from ours by {difference:.1e} of it after {count} steps")


def step(settings: Settings, recipe: str = "mnist-paper", batch_size: int | None = None) -> list[Case]:
    """One training step of a shipped recipe."""
    return _step_cases(settings, partial(benchmark_recipe, recipe, batch_size), recipe)


def _step_cases(settings: Settings, recipe_in: Callable[[str], Recipe], name: str) -> list[Case]:
    recipe = recipe_in("float32")
    data, modes = fake_data(recipe), _torch_modes(recipe, settings)
    what = f"one training step of {name}, batch {recipe.batch_size}"

    def check() -> None:
        for mode in modes:
            check_equal(recipe, data, mode)

    def case(precision: Precision) -> list[Entry]:
        recipe = recipe_in(layer_dtype(precision))
        work, variables = our_steps(recipe, data)
        if modes:
            work |= torch_steps(recipe, data, variables, modes)
        flops, size = step_flops(recipe, data), recipe.batch_size
        return [timed(f"{what}, {precision}", work, flops, precision, settings, examples=size)]

    cases = in_precisions(settings.precisions, case)
    return cases if settings.quick and _takes_batches(recipe) else checked(check, cases)


def backbone(settings: Settings, backbone: str) -> list[Case]:
    """One training step of a backbone and the head on photographs, and the features alone."""
    batch, side = settings.image_batch, settings.image_side
    recipe_in = partial(benchmark_recipe, "caltech101-paper", batch, backbone=backbone, side=side)
    what = f"{backbone}, {side} pixels"
    # Full float32 on a GPU runs beside the matrix units, which nobody trains images with; it comes last.
    settings = dataclasses.replace(settings, precisions=tuple(reversed(settings.precisions)))

    def features(precision: Precision) -> list[Entry]:
        recipe = recipe_in(dtype=layer_dtype(precision))
        work, flops = feature_passes(recipe, fake_data(recipe))
        title = f"features of {what}, batch {batch}, {precision}"
        return [timed(title, work, flops, precision, settings, examples=batch)]

    passes = [(f"features, {name}", run) for name, run in in_precisions(settings.precisions[:2], features)]
    steps = _step_cases(settings, lambda dtype: recipe_in(dtype=dtype), what)
    return [*steps[:2], *passes, *steps[2:]]


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
        from pspinal_jax.benchmark.torch_reference import EAGER, backbone_features

        work[EAGER] = backbone_features(recipe, data)
    return work, count_flops(features, variables, images)


def vgg5(settings: Settings) -> list[Case]:
    """An epoch of the KMNIST row, VGG-5 and head, with and without augmentation, and one training step."""
    data, steps = fake_data(benchmark_recipe("kmnist-paper")), settings.vgg5_steps

    def epoch_of(recipe: Recipe) -> Work:
        ours = EpochStep(recipe, data)
        return lambda count: ours.run(count * steps)

    def case(precision: Precision) -> list[Entry]:
        dtype = layer_dtype(precision)
        plain = benchmark_recipe("kmnist-paper", dtype=dtype)
        augmented = dataclasses.replace(load_recipe("kmnist-paper"), dtype=dtype)
        work = {f"{EPOCH}, augmented": epoch_of(augmented), f"{EPOCH}, not augmented": epoch_of(plain)}
        title, flops = f"{steps} steps of kmnist-paper in one program, {precision}", steps * step_flops(plain, data)
        return [timed(title, work, flops, precision, settings, examples=64 * steps, rounds=3, warm=False)]

    epochs = [(f"epoch, {name}", run) for name, run in in_precisions(settings.precisions, case)]
    return epochs + step(settings, "kmnist-paper")


def seeds(settings: Settings) -> list[Case]:
    """Several seeds of the MNIST row as one program."""
    data = fake_data(benchmark_recipe("mnist-paper"))
    base: dict[str, float] = {}

    def case(count: int, precision: Precision) -> list[Entry]:
        recipe = benchmark_recipe("mnist-paper", dtype=layer_dtype(precision))
        recipe = dataclasses.replace(recipe, num_seeds=count, seed_mode="vmap" if count > 1 else "loop")
        run = {"all": EpochStep(recipe, data).run}
        timing = time_interleaved(run, rounds=settings.rounds, seconds_per_round=settings.seconds_per_round)["all"]
        median = float(np.median(timing.seconds))
        rate = count * recipe.batch_size / median
        base.setdefault(precision, rate)
        row = [count, 1e3 * median, round(rate), rate / base[precision], timing.first_call]
        columns = ["seeds", "ms a step of all", "examples/s", "times one seed's rate", "first call s"]
        title = f"Seeds as one program, mnist-paper, batch 64, {precision}"
        return [table(title, columns, [row], {"examples/s": {f"{count} seeds": [rate]}})]

    return [
        (f"{count} seeds, {name}", run)
        for precision in settings.precisions[-2:]
        for count in settings.seeds
        for name, run in in_precisions([precision], partial(case, count))
    ]


def epoch(settings: Settings) -> list[Case]:
    """A whole epoch of the MNIST row, data handling included."""
    recipe = benchmark_recipe("mnist-paper")
    data = fake_data(recipe)

    def case(precision: Precision) -> list[Entry]:
        work = our_epochs(recipe, data)
        if has_torch():
            from pspinal_jax.benchmark.torch_reference import EAGER, MODES

            work |= torch_epochs(recipe, data, [EAGER] if settings.quick else list(MODES))
        count, size = len(data.labels), recipe.batch_size
        title = f"an epoch of mnist-paper, {count} images, batch {size}, {precision}"
        rounds = min(2, settings.rounds) if settings.quick else settings.rounds
        flops = count // size * step_flops(recipe, data)
        warm, examples = not settings.quick, count // size * size
        return [timed(title, work, flops, precision, settings, examples=examples, rounds=rounds, warm=warm)]

    return in_precisions(settings.precisions[:1], case)


def our_epochs(recipe: Recipe, data: Data) -> dict[str, Work]:
    """Our epoch, from drawing its order to its last step: one compiled chunk, or a jitted step called from Python."""

    def epochs(steps: EpochStep, run: Callable[[int], None]) -> Work:
        def work(count: int) -> None:
            for number in range(count):
                steps.begin_epoch(number)
                run(steps.num_steps)

        return work

    compiled, by_call = EpochStep(recipe, data), EpochStep(recipe, data)
    return {EPOCH: epochs(compiled, compiled.run), CALL: epochs(by_call, by_call.run_one_by_one)}


def torch_epochs(recipe: Recipe, data: Data, modes: list[str]) -> dict[str, Work]:
    """PyTorch's epochs: on tensors that lie on the device, in each of `modes`, and through a DataLoader."""
    import torch
    from torch.nn import functional

    from pspinal_jax.benchmark.torch_reference import EAGER, ImageExamples, recipe_step

    variables, size, device = EpochStep(recipe, data).variables, recipe.batch_size, torch_device()
    work: dict[str, Work] = {}
    for mode in modes:
        check_equal(recipe, data, mode)
        step, _ = recipe_step(recipe, data, variables, mode)

        def on_device(count: int, step: Callable[..., Any] = step) -> None:
            for _ in range(count):
                order = torch.randperm(len(data.labels), device=device)
                for start in range(0, len(order) - size + 1, size):
                    loss = step(order[start : start + size])
            float(loss.detach())  # waits for the device

        work[mode] = on_device
    examples = ImageExamples(data.images[..., 0], data.labels, *normalisation(recipe))
    loader = torch.utils.data.DataLoader(examples, size, shuffle=True, drop_last=True)
    _, model = recipe_step(recipe, data, variables, EAGER)
    optimizer = torch.optim.SGD(model.parameters(), recipe.optimizer.learning_rate, recipe.optimizer.momentum)

    def published(count: int) -> None:
        for _ in range(count):
            for batch, targets in loader:
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(batch.to(device)), targets.to(device))
                loss.backward()
                optimizer.step()
        float(loss.detach())

    return work | {PUBLISHED: published}


def augmentation(settings: Settings) -> list[Case]:
    """Perspective and rotation of 28x28 images inside a compiled loop, by batch size."""

    def case(batch: int) -> list[Entry]:
        images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, 28, 28, 1), np.uint8))

        @jax.jit
        def loop(images: jax.Array, count: jax.Array) -> jax.Array:
            def body(index: jax.Array, state: jax.Array) -> jax.Array:
                return augment(jax.random.fold_in(jax.random.key(0), index), state)

            return jax.lax.fori_loop(0, count, body, images)

        work = {"loop": lambda count: jax.block_until_ready(loop(images, np.int32(count)))}
        timing = time_interleaved(work, rounds=settings.rounds, seconds_per_round=settings.seconds_per_round)["loop"]
        rates = batch / timing.seconds
        row = [batch, 1e3 * float(np.median(timing.seconds)), round(float(np.median(rates)))]
        bars = {"images/s": {f"batch {batch}": rates.tolist()}}
        return [table("Perspective and rotation of 28x28 images", ["batch", "ms", "images/s"], [row], bars)]

    return [(f"batch {batch}", partial(case, batch)) for batch in (64, 1024)]
