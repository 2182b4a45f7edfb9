"""Training steps of a recipe: inside the compiled epoch and as `train` takes them, beside PyTorch's; whole epochs too.

All 60,000 images of 28x28 lie on the device, and of photographs a batch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.augment import augment
from pspinal_jax.benchmark.timing import (
    EAGER,
    Case,
    Entry,
    Precision,
    Settings,
    Work,
    beyond,
    calls,
    has_torch,
    layer_dtype,
    looped,
    table,
    timed,
    torch_device,
    torch_modes,
)
from pspinal_jax.data.arrays import to_batch
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.environment import convolution_options, jit_with
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.models import build_model, normalisation, with_default_preprocessing
from pspinal_jax.recipes import load_recipe
from pspinal_jax.recipes.schema import AugmentConfig, Recipe
from pspinal_jax.runs.build import build_run_programs
from pspinal_jax.training.costs import count_flops
from pspinal_jax.training.examples import one_example
from pspinal_jax.training.fit import CompiledTraining, FitOptions
from pspinal_jax.training.keys import make_order
from pspinal_jax.training.programs import Programs
from pspinal_jax.training.step import EpochPlan, count_rows

EPOCH, CALL, BATCH = "compiled epoch", "jitted step, Python loop", "jitted step"
LOOP = "compiled loop"
PUBLISHED = "PyTorch eager, DataLoader"
"""The published scripts' shape of work: every image a PIL image that a worker-less DataLoader turns into a tensor."""
_NUM_EXAMPLES = 60_000
_MOST_BYTES = 2**26
_NUM_FEATURES = 1280
"""Of recipes on features, an EfficientNet's."""
_REPEATED = 1024
"""Steps on the same batch in one program."""
_TOLERANCE = 1e-3


class Data(NamedTuple):
    """Images uint8 [N, H, W, C] or features float32 [N, D], their labels int32 [N] and the number of classes."""

    images: np.ndarray
    labels: np.ndarray
    num_classes: int


def benchmark_recipe(
    name: str, batch_size: int | None = None, dtype: str = "float32", backbone: str | None = None, side: int = 0
) -> Recipe:
    """The recipe `name` without augmentation, which is measured by itself, and perhaps with another backbone."""
    recipe = load_recipe(name)
    data, model = dataclasses.replace(recipe.data, augment="none", resize=None), recipe.model
    if side:
        data = dataclasses.replace(data, image_size=side)
    if backbone:
        model = dataclasses.replace(model, backbone=backbone, weights=None)  # type: ignore[arg-type]
    changes: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size or recipe.batch_size, "num_seeds": 1}
    plain = dataclasses.replace(recipe, data=data, model=model, augment=AugmentConfig(), **changes)
    return with_default_preprocessing(plain)


def fake_data(recipe: Recipe, num_features: int | None = None, num_classes: int | None = None) -> Data:
    """Random data of the recipe's shape: a step's time does not depend on what is in it."""
    rng = np.random.default_rng(0)
    side, known = recipe.data.side, CATALOGUE.get(recipe.data.name)
    known = known if known and known.image_shape[0] else None
    named = recipe.data.num_classes or (len(known.class_names) if known else 0)
    of_images = (side, side, 3) if side else known.image_shape if known else None
    shape = of_images or (num_features or _NUM_FEATURES,)
    if num_features and of_images:
        raise UsageError(f"num_features is {num_features}, but {recipe.card.name} sees images of shape {shape}")
    num_classes = num_classes or named or 101
    fitting = max(_MOST_BYTES // math.prod(shape), recipe.batch_size)
    count = recipe.batch_size if side else min(_NUM_EXAMPLES, fitting)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    inputs = images if of_images else images.astype(np.float32) / 255
    return Data(inputs, rng.integers(0, num_classes, count, np.int32), num_classes)


def _takes_batches(recipe: Recipe) -> bool:
    return recipe.data.image_size is not None


class Steps:
    """Our training step, its programs and its state: on data in memory, or on one batch that the host brings.

    Args:
      programs: the compiled steps.
      data: (inputs, labels) of all examples, or of the batch.
      order: the examples in the order of their first visit.
      learning_rate: of every step.
      seeds: how many seeds train side by side.
      streams: whether `data` is a batch that is sharded, and steps are taken one by one.
    """

    def __init__(
        self,
        programs: Programs,
        data: Any,
        order: np.ndarray,
        learning_rate: float = 1.0,
        seeds: int = 1,
        streams: bool = False,
    ) -> None:
        self.programs, self._streams = programs, streams
        numbers = np.arange(seeds, dtype=np.uint32)
        self.seed = programs.replicate(numbers if programs.vectorized else numbers[0])
        self.state, self.totals = programs.init(self.seed), programs.zero_totals(self.seed)
        self.num_steps = len(order) // programs.batch_size
        shuffle = not streams and count_rows(data) == len(order)
        self._draw_order = make_order(order, len(order), programs.vectorized, shuffle)
        rates = np.full(self.num_steps, learning_rate, np.float32)
        self._rates = np.tile(rates, (seeds, 1)) if programs.vectorized else rates
        self._data = programs.shard_batch(data) if streams else programs.replicate(data)
        self.begin_epoch(0)

    @classmethod
    def of_recipe(cls, recipe: Recipe, data: Data) -> "Steps":
        """The steps of `recipe` on `data`."""
        shape, arrays = data.images.shape[1:], (data.images, data.labels)
        model = build_model(recipe, shape, data.num_classes)
        programs = build_run_programs(recipe, model, shape, data.images.dtype)
        order, rate = np.arange(len(data.labels)), recipe.optimizer.learning_rate
        return cls(programs, arrays, order, rate, recipe.num_seeds, _takes_batches(recipe))

    def flops(self) -> int:
        """Operations of a step's products and convolutions, see `count_flops`."""
        program, arguments = self._call(0, 1)
        return count_flops(program, *arguments).total() // (1 if self._streams else self.programs.block)

    def begin_epoch(self, number: int) -> None:
        """Draw the order of epoch `number`."""
        self.order = self._draw_order(self.seed, self.programs.replicate(np.int32(number)))
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
        program, arguments = self._call(first, count)
        self.state, self.totals = program(*arguments)

    def _call(self, first: int, count: int) -> tuple[Any, tuple[Any, ...]]:
        sums, programs = (self.state, self.totals, self.seed), self.programs
        if self._streams:
            return programs.batch_step, (*sums, self._rates[0], self._data)
        return programs.chunk, (*sums, self._plan, np.int32(first), np.int32(count), self._data)


def our_steps(recipe: Recipe, data: Data) -> tuple[dict[str, Work], Steps]:
    """Ways to run our step, by name, and the first one's state."""
    by_call = Steps.of_recipe(recipe, data)
    if _takes_batches(recipe):
        return {BATCH: by_call.run_one_by_one}, by_call
    epoch = Steps.of_recipe(recipe, data)
    return {EPOCH: epoch.run, CALL: by_call.run_one_by_one}, epoch


def torch_steps(recipe: Recipe, data: Data, variables: dict[str, Any], modes: Sequence[str]) -> dict[str, Work]:
    """PyTorch's step in each of `modes`, from our initial variables; every epoch has an order of its own."""
    if not modes:
        return {}
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

        ours = Steps.of_recipe(plain, data)
        step, _ = recipe_step(plain, data, ours.variables, mode)
        order = torch.from_numpy(np.array(ours.order)).long().to(torch_device())
        losses = [float(step(order[index * size % len(order) :][:size]).detach()) for index in range(count)]
        ours.run_one_by_one(count)
        mean = float(ours.totals.loss) / (count * size)
        difference = abs(np.mean(losses) - mean) / mean
        if not difference <= _TOLERANCE:
            raise RunError(f"benchmark: {mode}'s loss differs from ours by {difference:.1e} of it after {count} steps")


def step(
    settings: Settings,
    recipe: str | None = None,
    batch_size: int | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
    num_features: int | None = None,
    num_classes: int | None = None,
) -> list[Case]:
    """One training step of a recipe, by its name or the path of its file, perhaps with another backbone."""
    name = recipe or {None: "mnist-paper", "vgg5": "kmnist-paper"}.get(backbone, "caltech101-paper")
    make = partial(benchmark_recipe, name, batch_size, backbone=backbone, side=image_size or 0)
    data = fake_data(make(), num_features, num_classes)
    what = name if backbone is None else f"{name} with {backbone}"
    return _step_cases(settings, lambda dtype: make(dtype=dtype), what, data)


def _step_cases(settings: Settings, recipe_in: Callable[[str], Recipe], name: str, data: Data) -> list[Case]:
    recipe = recipe_in("float32")
    photographs = _takes_batches(recipe)
    convolves_long = recipe.model.backbone != "none" and (photographs or jax.default_backend() == "cpu")
    title, modes = f"one training step of {name}, batch {recipe.batch_size}", torch_modes(settings.quick)
    if modes:
        from pspinal_jax.benchmark.torch_reference import missing_setting

        if missing := missing_setting(recipe):
            title, modes = f"{title} (PyTorch's side has no {missing})", ()

    def case(precision: Precision, modes: Sequence[str]) -> Entry:
        recipe = recipe_in(layer_dtype(precision))
        work, ours = our_steps(recipe, data)
        work |= torch_steps(recipe, data, ours.variables, modes)
        return timed(f"{title}, {precision}", work, ours.flops(), precision, settings, examples=recipe.batch_size)

    cases = [Case(precision, partial(case, precision, modes), precision) for precision in settings.precisions]
    check = [] if settings.quick and photographs else [Case("same losses", partial(check_equal, recipe, data, modes))]
    if not settings.quick:
        return check + cases
    compiled = torch_modes(quick=False) if modes and not convolves_long else modes
    again = [
        beyond(Case(f"{each.name}, torch.compile too", partial(case, each.precision, compiled), each.precision), 3)
        for each in cases
    ]
    return [*check, cases[0], *map(beyond, cases[1:]), *(again if compiled != modes else [])]


def time_step(
    model: Any,
    batch: Any,
    *,
    peers: Mapping[str, Callable[[], Any]] | None = None,
    settings: Settings,
    precision: Precision,
    **training: Any,
) -> Entry:
    """See `pspinal_jax.benchmark.step`."""
    arrays = to_batch(batch)
    size = count_rows(arrays)
    kept = ("optimizer", "loss", "metrics", "augment", "mesh")
    given = {name: training.pop(name) for name in kept if name in training}
    made = CompiledTraining(model, one_example(arrays), size, FitOptions(**training), **given)
    order = np.tile(np.arange(size), _REPEATED)

    def steps(streams: bool) -> Steps:
        return Steps(made.programs, arrays, order[: size if streams else None], streams=streams)

    one = steps(streams=True)
    work: dict[str, Work] = {LOOP: steps(streams=False).run} if made.on_device else {}
    work[CALL] = one.run_one_by_one
    work |= {name: calls(peer) for name, peer in (peers or {}).items()}
    title = f"one training step of {type(model).__name__}, batch {size}, {precision}"
    return timed(title, work, one.flops(), precision, settings, examples=size)


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

    passes = [beyond(Case(f"features, {name}", partial(features, name), name)) for name in settings.precisions[:2]]
    steps = _step_cases(settings, lambda dtype: recipe_in(dtype=dtype), what, fake_data(recipe_in()))
    begin = 1 + next(index for index, each in enumerate(steps) if each.name == settings.precisions[0])
    return [*steps[:begin], *passes, *steps[begin:]]


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
    return work, count_flops(features, variables, images).total()


def vgg5(settings: Settings) -> list[Case]:
    """An epoch of the KMNIST row, VGG-5 and head, with and without augmentation, and one training step."""
    data, steps = fake_data(benchmark_recipe("kmnist-paper")), settings.vgg5_steps

    def epoch_of(recipe: Recipe) -> Work:
        run = Steps.of_recipe(recipe, data).run
        return lambda count: run(count * steps)

    def case(precision: Precision) -> Entry:
        dtype = layer_dtype(precision)
        plain = benchmark_recipe("kmnist-paper", dtype=dtype)
        augmented = dataclasses.replace(load_recipe("kmnist-paper"), dtype=dtype)
        work = {f"{EPOCH}, augmented": epoch_of(augmented), f"{EPOCH}, not augmented": epoch_of(plain)}
        title = f"{steps} steps of kmnist-paper in one program, {precision}"
        flops = steps * Steps.of_recipe(plain, data).flops()
        return timed(title, work, flops, precision, settings, examples=64 * steps, rounds=3, warm=False)

    epochs = [
        beyond(Case(f"epoch, {precision}", partial(case, precision), precision)) for precision in settings.precisions
    ]
    return step(settings, "kmnist-paper") + epochs


def seeds(settings: Settings) -> list[Case]:
    """Several seeds of the MNIST row as one program, beside one seed of PyTorch's."""
    data = fake_data(benchmark_recipe("mnist-paper"))

    def case(count: int, precision: Precision, modes: Sequence[str] = ()) -> Entry:
        recipe = benchmark_recipe("mnist-paper", dtype=layer_dtype(precision))
        one, name = Steps.of_recipe(recipe, data), f"{count} seeds"
        work: dict[str, Work] = {"1 seeds": one.run, **torch_steps(recipe, data, one.variables, modes)}
        if count > 1:
            many = dataclasses.replace(recipe, num_seeds=count, seed_mode="vmap")
            work[name] = Steps.of_recipe(many, data).run
        timings = settings.time(work)
        rates = {each: (count if each == name else 1) * 64 / timing.median for each, timing in timings.items()}
        shown = {name: timings[name]} | {mode: timings[mode] for mode in modes}
        rows = [
            {
                "seeds": each,
                "ms a step of all": 1e3 * timing.median,
                "examples/s": round(rates[each]),
                "times one seed's rate": rates[each] / rates["1 seeds"],
                "first call s": timing.first_call,
            }
            for each, timing in shown.items()
        ]
        title = f"Seeds as one program, mnist-paper, batch 64, {precision}"
        return table(title, rows, {"examples/s": {each: [rates[each]] for each in shown}})

    cases = [
        Case(f"{count} seeds, {precision}", partial(case, count, precision), precision)
        for precision in settings.precisions[-2:]
        for count in settings.seeds
    ]
    first = partial(case, settings.seeds[0], cases[0].precision, torch_modes(settings.quick))
    return [cases[0]._replace(run=first), *map(beyond, cases[1:])]


def epoch(settings: Settings) -> list[Case]:
    """A whole epoch of the MNIST row, data handling included."""
    recipe, quick = benchmark_recipe("mnist-paper"), settings.quick
    data = fake_data(recipe)

    def case(modes: Sequence[str], published: bool) -> Entry:
        work = our_epochs(recipe, data) | torch_epochs(recipe, data, modes, published)
        steps, size = len(data.labels) // recipe.batch_size, recipe.batch_size
        title = f"an epoch of mnist-paper, {len(data.labels)} images, batch {size}, {precision}"
        how: dict[str, Any] = {"rounds": min(2, settings.rounds), "warm": False} if quick else {}
        flops = steps * Steps.of_recipe(recipe, data).flops()
        return timed(title, work, flops, precision, settings, examples=steps * size, **how)

    precision, modes = settings.precisions[0], torch_modes(quick)
    check = Case("same losses", partial(check_equal, recipe, data, modes))
    whole = Case(precision, partial(case, torch_modes(quick=False), published=True), precision)
    if not quick:
        return [check, whole]
    more = beyond(whole._replace(name=f"{precision}, all forms of PyTorch"), 4)
    return [whole._replace(run=partial(case, modes, published=False)), more]


def our_epochs(recipe: Recipe, data: Data) -> dict[str, Work]:
    """Our epoch, from drawing its order to its last step: one compiled chunk, or a jitted step called from Python."""

    def epochs(steps: Steps, run: Callable[[int], None], count: int) -> None:
        for number in range(count):
            steps.begin_epoch(number)
            run(steps.num_steps)

    compiled, by_call = Steps.of_recipe(recipe, data), Steps.of_recipe(recipe, data)
    return {EPOCH: partial(epochs, compiled, compiled.run), CALL: partial(epochs, by_call, by_call.run_one_by_one)}


def torch_epochs(recipe: Recipe, data: Data, modes: Sequence[str], published: bool = True) -> dict[str, Work]:
    """PyTorch's epochs: on tensors on the device, in each of `modes`, and `published`, through a DataLoader."""
    if not modes:
        return {}
    import torch

    from pspinal_jax.benchmark.torch_reference import ImageExamples, published_epoch, recipe_step

    variables, size = Steps.of_recipe(recipe, data).variables, recipe.batch_size
    num_steps = len(data.labels) // size
    steps = torch_steps(recipe, data, variables, modes)
    work: dict[str, Work] = {mode: lambda count, mode=mode: steps[mode](count * num_steps) for mode in modes}  # type: ignore[misc]
    if not published:
        return work
    examples = ImageExamples(data.images[..., 0], data.labels, *normalisation(recipe))
    loader = torch.utils.data.DataLoader(examples, size, shuffle=True, drop_last=True)
    model = recipe_step(recipe, data, variables, EAGER)[1]
    optimizer = torch.optim.SGD(model.parameters(), recipe.optimizer.learning_rate, recipe.optimizer.momentum)

    def through_loader(count: int) -> None:
        for _ in range(count):
            published_epoch(model, optimizer, loader)

    return {**work, PUBLISHED: through_loader}


def augmentation(settings: Settings) -> list[Case]:
    """Perspective and rotation of 28x28 images inside a compiled loop, by batch size, beside PyTorch's sampling."""

    def case(batch: int) -> Entry:
        images = np.random.default_rng(0).integers(0, 256, (batch, 28, 28, 1), np.uint8)

        def body(index: jax.Array, images: jax.Array) -> jax.Array:
            return augment(jax.random.fold_in(jax.random.key(0), index), images)

        work: dict[str, Work] = {LOOP: looped(body, jnp.asarray(images))}
        if has_torch():
            import torch

            from pspinal_jax.benchmark.torch_reference import passes, warped

            work[EAGER] = passes(warped, torch.from_numpy(images).to(torch_device()))
        timings = settings.time(work)
        rates = {name: [batch / timing.median] for name, timing in timings.items()}
        rows = [
            {"batch": batch, "alternative": name, "ms": 1e3 * timing.median, "images/s": round(rates[name][0])}
            for name, timing in timings.items()
        ]
        bars = {f"{name}, batch {batch}": rate for name, rate in rates.items()}
        return table("Perspective and rotation of 28x28 images", rows, {"images/s": bars})

    cases = [Case(f"batch {batch}", partial(case, batch)) for batch in (64, 1024)]
    return [cases[0], beyond(cases[1])]
