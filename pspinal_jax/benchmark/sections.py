"""The sections of `benchmark all`: what each measures, as a list of cases, on a CPU or an accelerator."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.benchmark.precision import Precision, layer_dtype, set_precision
from pspinal_jax.benchmark.report import Measurement, summarize, torch_version
from pspinal_jax.benchmark.timing import Work, time_interleaved

Entry = dict[str, Any]
Case = tuple[str, Callable[[], list[Entry]]]
"""A name, and what measures it."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
      precisions: each compared in turn.
      rounds: how often each alternative is timed.
      seconds_per_round: about how long each timing takes.
      seeds: numbers of seeds trained as one program.
      depths: numbers of layers.
      image_batch: images a step of the image recipes.
      image_side: their side in pixels.
      compiled_images: whether torch.compile is tried on those too; it takes minutes.
      vgg5_steps: steps of VGG-5 in one timing, a whole epoch on an accelerator.
    """

    precisions: Sequence[Precision]
    rounds: int = 7
    seconds_per_round: float = 0.2
    seeds: Sequence[int] = (1, 2, 4, 8)
    depths: Sequence[int] = (4, 16, 64)
    image_batch: int = 8
    image_side: int = 224
    compiled_images: bool = False
    vgg5_steps: int = 2


def machine(sizes: Sizes) -> list[Case]:
    """What the machine can do at best, in JAX and in PyTorch."""
    from pspinal_jax.benchmark.roofline import measure_roofline, torch_product_rate

    def case(precision: Precision) -> list[Entry]:
        ours = measure_roofline(jnp.dtype(layer_dtype(precision)))
        rates = {"precision": precision, "torch_flops_per_second": torch_product_rate(layer_dtype(precision))}
        return [{"kind": "peak"} | ours | rates]

    return [(precision, _under(precision, case)) for precision in sizes.precisions]


def step(sizes: Sizes) -> list[Case]:
    """One training step of the MNIST row: 784 pixels, the head, batch 64."""
    return _small_step("mnist-paper", sizes, compiled=True)


def vgg5(sizes: Sizes) -> list[Case]:
    """One training step of the KMNIST row (VGG-5 and head, batch 64), and an epoch with augmentation."""
    from pspinal_jax.benchmark.step import NUM_EXAMPLES, JaxStep, benchmark_recipe, fake_data, step_flops
    from pspinal_jax.recipes import load_recipe

    data = fake_data()

    def epoch(precision: Precision) -> list[Entry]:
        augmented = dataclasses.replace(load_recipe("kmnist-paper"), dtype=layer_dtype(precision))
        plain = benchmark_recipe("kmnist-paper", dtype=layer_dtype(precision))
        steps = sizes.vgg5_steps

        def epoch_of(recipe: Any) -> Work:
            ours = JaxStep(recipe, data)
            return lambda count: ours.run(count * steps)

        work = {"compiled epoch, augmented": epoch_of(augmented), "compiled epoch, not augmented": epoch_of(plain)}
        timings = time_interleaved(work, rounds=3, warm=False)
        title = f"{steps} steps of kmnist-paper in one program, {precision}"
        flops = steps * step_flops(plain)
        entry = _timed(Measurement(title, timings, next(iter(work)), flops), precision)
        seconds = {name: float(np.median(timing.seconds)) / steps for name, timing in timings.items()}
        rows = [[name, NUM_EXAMPLES / 64 * value, round(64 / value)] for name, value in seconds.items()]
        title = f"An epoch of VGG-5, {NUM_EXAMPLES} images, {precision}"
        return [entry, _table(title, ["", "s an epoch", "images/s"], rows, precision)]

    epochs = [(f"epoch, {precision}", _under(precision, epoch)) for precision in sizes.precisions]
    return epochs + _small_step("kmnist-paper", sizes, compiled=jax.default_backend() != "cpu")


def _small_step(name: str, sizes: Sizes, compiled: bool) -> list[Case]:
    from pspinal_jax.benchmark.step import OURS, JaxStep, benchmark_recipe, fake_data, step_flops, torch_steps

    data = fake_data()

    def case(precision: Precision, peers: bool) -> list[Entry]:
        recipe = benchmark_recipe(name, dtype=layer_dtype(precision))
        ours, by_call = JaxStep(recipe, data), JaxStep(recipe, data)
        work = {OURS: ours.run, "jitted step, Python loop": by_call.run_one_by_one}
        if peers:
            checked = precision == "float32"  # what rounds more differs by more than a check can tell from a fault
            work |= torch_steps(recipe, data, ours, compiled=compiled, checked=checked)
        title = f"one training step of {name}, batch {recipe.batch_size}, {precision}"
        return [_timed(Measurement(title, _time(work, sizes), OURS, step_flops(recipe)), precision)]

    return _with_peers(sizes, case)


def head(sizes: Sizes) -> list[Case]:
    """Forward and backward pass of the head alone at five sizes, in training mode."""
    from pspinal_jax.benchmark.head import SHAPES, check_equal, suite_alternatives, torch_alternatives
    from pspinal_jax.benchmark.head import Case as HeadCase

    def case(shape: Any, precision: Precision, peers: bool) -> list[Entry]:
        arrays = HeadCase(shape, jnp.dtype(layer_dtype(precision)))
        work = suite_alternatives(arrays)
        ours = next(iter(work))
        if peers:
            work |= torch_alternatives(arrays)
        measurement = Measurement(f"{shape}, {precision}", _time(work, sizes), ours, shape.flops)
        return [_timed(measurement, precision)]

    def check() -> list[Entry]:
        set_precision("float32")
        check_equal(HeadCase(SHAPES[1]))
        return []

    cases = []
    for shape in SHAPES:
        of_shape = _with_peers(sizes, partial(case, shape))
        cases += [(f"{shape}, {name}", do) for name, do in of_shape]
    return [("equality with PyTorch at the smallest size", check), *cases] if torch_is_here() else cases


def epoch(sizes: Sizes) -> list[Case]:
    """A whole epoch of the MNIST row, data handling included."""
    from pspinal_jax.benchmark.epoch import OURS, jax_epochs, torch_epochs
    from pspinal_jax.benchmark.step import NUM_EXAMPLES, benchmark_recipe, fake_data, step_flops

    recipe, data = benchmark_recipe("mnist-paper"), fake_data()

    def case(precision: Precision, peers: bool) -> list[Entry]:
        work = jax_epochs(recipe, data) | (torch_epochs(recipe, data, compiled=False) if peers else {})
        timings = time_interleaved(work, rounds=min(2, sizes.rounds), warm=False)
        title = f"an epoch of mnist-paper, {NUM_EXAMPLES} images, batch {recipe.batch_size}, {precision}"
        flops = NUM_EXAMPLES // recipe.batch_size * step_flops(recipe)
        return [_timed(Measurement(title, timings, OURS, flops), precision)]

    return _with_peers(dataclasses.replace(sizes, precisions=sizes.precisions[:1]), case)


def seeds(sizes: Sizes) -> list[Case]:
    """Several seeds of the MNIST row as one program."""
    from pspinal_jax.benchmark.step import JaxStep, benchmark_recipe, fake_data

    data = fake_data()
    base: dict[str, float] = {}

    def case(count: int, precision: Precision) -> list[Entry]:
        recipe = benchmark_recipe("mnist-paper", dtype=layer_dtype(precision))
        recipe = dataclasses.replace(recipe, num_seeds=count, seed_mode="vmap" if count > 1 else "loop")
        steps = JaxStep(recipe, data)
        timing = _time({"all": steps.run}, sizes)["all"]
        milliseconds = 1e3 * float(np.median(timing.seconds))
        rate = 1e3 * count * recipe.batch_size / milliseconds
        base.setdefault(precision, rate)
        row = [count, milliseconds, round(rate), rate / base[precision], timing.first_call, peak_memory()]
        columns = ["seeds", "ms a step of all", "examples/s", "times one seed's rate", "first call s", "peak MB"]
        return [_table(f"Seeds as one program, mnist-paper, batch 64, {precision}", columns, [row], precision)]

    return [
        (f"{count} seeds, {precision}", _under(precision, partial(case, count)))
        for precision in sizes.precisions[-2:]
        for count in sizes.seeds
    ]


def depth(sizes: Sizes) -> list[Case]:
    """Compile and run time of the head's gradient as the number of layers grows."""
    from pspinal_jax.benchmark.depth import measure

    def case(number: int) -> list[Entry]:
        measured = measure((number,), 1)
        rows = [
            [name, number, values[number]["compile_seconds"], values[number]["run_ms"]]
            for name, values in measured.items()
            if number in values
        ]
        columns = ["", "layers", "compile s", "ms a call"]
        return [_table("Gradient of the head, D 256, W 16, C 10, batch 64", columns, rows, "float32")]

    return [(f"{number} layers", partial(case, number)) for number in sizes.depths]


def augmentation(sizes: Sizes) -> list[Case]:
    """Images augmented a second inside a compiled loop."""
    from pspinal_jax.augment import augment

    def case(batch: int) -> list[Entry]:
        images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, 28, 28, 1), np.uint8))

        @jax.jit
        def loop(images: jax.Array, count: jax.Array) -> jax.Array:
            def body(index: jax.Array, state: jax.Array) -> jax.Array:
                return augment(jax.random.fold_in(jax.random.key(0), index), state)

            return jax.lax.fori_loop(0, count, body, images)

        work = {"loop": lambda count: jax.block_until_ready(loop(images, np.int32(count)))}
        milliseconds = 1e3 * float(np.median(_time(work, sizes)["loop"].seconds))
        row = [batch, milliseconds, round(1e3 * batch / milliseconds)]
        return [_table("Perspective and rotation of 28x28 images", ["batch", "ms", "images/s"], [row], "float32")]

    return [(f"batch {batch}", partial(case, batch)) for batch in (64, 1024)]


def images(backbone: Any, sizes: Sizes) -> list[Case]:
    """One training step of `backbone` and the head on images, and the features alone."""
    from pspinal_jax.benchmark.image_step import (
        OURS,
        ImageStep,
        fake_images,
        feature_passes,
        image_step_flops,
        torch_image_steps,
    )
    from pspinal_jax.benchmark.step import benchmark_recipe

    def recipe_for(precision: Precision) -> Any:
        recipe = benchmark_recipe("caltech101-paper", sizes.image_batch, layer_dtype(precision))
        data = dataclasses.replace(recipe.data, image_size=sizes.image_side)
        model = dataclasses.replace(recipe.model, backbone=backbone, weights=None)
        return dataclasses.replace(recipe, data=data, model=model)

    what = f"{backbone}, batch {sizes.image_batch}, {sizes.image_side} pixels"

    def case(precision: Precision, peers: bool) -> list[Entry]:
        recipe = recipe_for(precision)
        batch = fake_images(recipe)
        ours = ImageStep(recipe, batch)
        work = {OURS: ours.run}
        if peers:
            work |= torch_image_steps(recipe, batch, ours, sizes.compiled_images, checked=False)
        measurement = Measurement(
            f"one step of {what}, {precision}", _time(work, sizes), OURS, image_step_flops(recipe)
        )
        rows = [
            [
                name,
                round(sizes.image_batch / float(np.median(timing.seconds)), 1),
                peak_memory() if name == OURS else _torch_memory(),
            ]
            for name, timing in measurement.timings.items()
        ]
        columns = ["", "images/s, training", "peak MB of the process"]
        return [_timed(measurement, precision), _table(f"{what}, {precision}", columns, rows, precision)]

    def forward(precision: Precision, peers: bool) -> list[Entry]:
        recipe = recipe_for(precision)
        work, flops = feature_passes(recipe, fake_images(recipe), peers)
        measurement = Measurement(f"features of {what}, {precision}", _time(work, sizes), next(iter(work)), flops)
        return [_timed(measurement, precision)]

    # Full float32 on a GPU runs beside the matrix units, which nobody trains images with; it comes last.
    ordered = dataclasses.replace(sizes, precisions=tuple(reversed(sizes.precisions)))
    steps, passes = _with_peers(ordered, case), _with_peers(ordered, forward)
    return [*steps[:2], *[(f"features, {name}", do) for name, do in passes[:2]], *steps[2:]]


SECTIONS: dict[str, Callable[[Sizes], list[Case]]] = {
    "machine": machine,
    "step": step,
    "head": head,
    "vgg5": vgg5,
    "seeds": seeds,
    "efficientnet_lite0": lambda sizes: images("efficientnet_lite0", sizes),
    "resnet50": lambda sizes: images("resnet50", sizes),
    "wide_resnet101_2": lambda sizes: images("wide_resnet101_2", sizes),
    "depth": depth,
    "epoch": epoch,
    "augmentation": augmentation,
}


def _under(precision: Precision, case: Callable[[Precision], list[Entry]]) -> Callable[[], list[Entry]]:
    def run() -> list[Entry]:
        set_precision(precision)
        return case(precision)

    return run


def _with_peers(sizes: Sizes, case: Callable[[Precision, bool], list[Entry]]) -> list[Case]:
    """`case` in each precision, beside PyTorch where it is installed."""
    peers = torch_is_here()
    return [(name, _under(name, lambda precision: case(precision, peers))) for name in sizes.precisions]


def torch_is_here() -> bool:
    """Whether PyTorch, the peer, is installed."""
    return bool(torch_version())


def _time(work: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    settle = 0.2 if jax.default_backend() == "cpu" else 0.01
    return time_interleaved(work, rounds=sizes.rounds, seconds_per_round=sizes.seconds_per_round, settle_seconds=settle)


def _timed(measurement: Measurement, precision: Precision) -> Entry:
    return {"kind": "timings", "precision": precision} | summarize(measurement, _peak(precision))


def _table(title: str, columns: list[str], rows: list[list[Any]], precision: str) -> Entry:
    return {"kind": "table", "title": title, "columns": columns, "rows": rows, "precision": precision}


peaks: dict[str, float] = {}
"""Operations a second of products by precision, as the section machine measured them."""


def _peak(precision: Precision) -> float | None:
    return peaks.get(precision)


def peak_memory() -> int | None:
    """Megabytes that XLA held at most on the first device, where it tells."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return None if peak is None else round(peak / 1e6)


def _torch_memory() -> int | None:
    import torch

    return round(torch.cuda.max_memory_allocated() / 1e6) if torch.cuda.is_available() else None
