"""`pspinal-jax benchmark WHAT`: measure something beside its peers."""

import contextlib
import dataclasses
import io
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pspinal_jax.errors import UsageError
from pspinal_jax.files import expanded

NO_TORCH = "PyTorch eager and torch.compile: torch is not installed (extra `torch`)"


@dataclasses.dataclass(frozen=True)
class StepArguments:
    """One training step of a recipe inside the compiled epoch, beside its peers."""

    recipe: Literal["mnist-paper", "kmnist-paper", "caltech101-paper"] = "mnist-paper"
    """mnist-paper: the head on 784 pixels; kmnist-paper: VGG-5 and head; caltech101-paper: Wide-ResNet-101-2 and head
    on colour images. Without augmentation."""
    workdir: Path = Path("runs/benchmark-step")
    """Where results.json and results.png go."""
    batch_size: int | None = None
    """Examples a step; the recipe's by default."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype to compute in."""
    rounds: int = 15
    """How often each alternative is timed, in turn with the others."""
    seconds_per_round: float = 0.4
    """About how long each timing takes."""


@dataclasses.dataclass(frozen=True)
class HeadArguments:
    """Forward and backward pass of the head at five sizes, beside its peers."""

    workdir: Path = Path("runs/benchmark-head")
    """Where results.json and results.png go."""
    rounds: int = 11
    """How often each alternative is timed, in turn with the others."""
    seconds_per_round: float = 0.2
    """About how long each timing takes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype to compute in."""


@dataclasses.dataclass(frozen=True)
class EpochArguments:
    """A whole epoch of mnist-paper, data handling included, beside its peers."""

    workdir: Path = Path("runs/benchmark-epoch")
    """Where results.json and results.png go."""
    rounds: int = 5
    """How often each alternative is timed, in turn with the others."""
    seconds_per_round: float = 1.0
    """About how long each timing takes; at least one epoch."""


@dataclasses.dataclass(frozen=True)
class CompileArguments:
    """`train` from process start to end, with an empty and with a warm compilation cache."""

    train: tuple[str, ...] = ("digits",)
    """The recipe and flags of `train`, flags written without their leading dashes as name=value: digits epochs=1."""
    workdir: Path = Path("runs/benchmark-compile")
    """Where results.json and results.png go."""
    rounds: int = 3
    """How often it is run with each cache."""
    published_data: Path | None = None
    """Time the MNIST row's published settings in PyTorch too, on this .npz file."""
    published_epochs: int = 50
    """For so many epochs; the script has 50."""


@dataclasses.dataclass(frozen=True)
class DepthArguments:
    """Compile and run time of the head's gradient as the number of layers grows."""

    workdir: Path = Path("runs/benchmark-depth")
    """Where results.json and results.png go."""
    rounds: int = 3
    """How often each alternative is compiled and timed."""
    depths: tuple[int, ...] = (4, 16, 64, 256)
    """Numbers of layers."""


@dataclasses.dataclass(frozen=True)
class InputArguments:
    """Images decoded and resized a second, beside a PyTorch DataLoader."""

    workdir: Path = Path("runs/benchmark-input")
    """Where results.json and results.png go."""
    pictures: int = 4800
    """Images in a pass."""
    workers: int = 2
    """Worker processes."""
    rounds: int = 5
    """How often each alternative is timed, in turn with the others."""


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Trials of `compare` on features of Caltech-101's sizes, beside the same trainings in eager PyTorch."""

    workdir: Path = Path("runs/benchmark-compare")
    """Where results.json and results.png go."""
    trials: int = 4
    """Trials of every head, on both sides."""
    epochs: int = 20
    """Passes of each."""
    batch_size: int = 64
    """Examples a step."""
    heads: tuple[Literal["progressive", "spinal", "mlp", "dense"], ...] = ("progressive", "spinal", "mlp", "dense")
    """The heads."""


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:8} {arguments.__doc__}" for name, (arguments, _) in _BENCHMARKS.items()]
        lines += [f"  {'all':8} {_all.__doc__}"]
        print(
            "\n".join(
                ["usage: pspinal-jax benchmark WHAT [flags]", "", *lines, "", "example: pspinal-jax benchmark step"]
            )
        )
        return 0 if args else UsageError.exit_status
    if args[0] == "all":
        return _all(args[1:])
    if args[0] not in _BENCHMARKS:
        raise UsageError(f"unknown benchmark {args[0]!r}; there are: {', '.join(_BENCHMARKS)}, all")
    from pspinal_jax.commands.parse import parse
    from pspinal_jax.environment import check_platform

    arguments, run = _BENCHMARKS[args[0]]
    parsed = parse(
        arguments,
        args[1:],
        prog=f"pspinal-jax benchmark {args[0]}",
        description=str(arguments.__doc__),
        example=f"pspinal-jax benchmark {args[0]}",
        default=arguments(),
    )
    check_platform()
    run(parsed, f"pspinal-jax benchmark {shlex.join(args)}")
    return 0


def _all(args: Sequence[str]) -> int:
    """Every benchmark, each with its part of the time, as one report with tables and plots."""
    # argparse, since this one runs where nothing but JAX's own packages and PyTorch are installed.
    import argparse

    parser = argparse.ArgumentParser(
        prog="pspinal-jax benchmark all", description=_all.__doc__, epilog="example: pspinal-jax benchmark all --tiny"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="about how long it may take (default: 8)")
    parser.add_argument("--workdir", type=expanded, default=Path("runs/benchmark-all"), help="where report.md goes")
    parser.add_argument("--sections", nargs="+", default=[], help="only these")
    parser.add_argument("--precisions", nargs="+", default=[], choices=("float32", "tf32", "bfloat16"))
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: a rehearsal, its figures mean nothing")
    parser.add_argument("--overwrite", action="store_true", help="write over the results in --workdir")
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            parsed = parser.parse_args(args)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(said.getvalue().strip().splitlines()[-1].split("error: ")[-1]) from None
    from pspinal_jax.benchmark.suite import run_suite

    command = f"pspinal-jax benchmark all {shlex.join(args)}".strip()
    failed = run_suite(
        parsed.workdir, parsed.minutes, command, parsed.sections, parsed.precisions, parsed.tiny, parsed.overwrite
    )
    return 1 if failed else 0


def _step(arguments: StepArguments, command: str) -> None:
    import jax.numpy as jnp

    from pspinal_jax.benchmark.report import Measurement, write_report
    from pspinal_jax.benchmark.roofline import measure_roofline
    from pspinal_jax.benchmark.step import benchmark_recipe
    from pspinal_jax.benchmark.timing import time_interleaved

    recipe = benchmark_recipe(arguments.recipe, arguments.batch_size, arguments.dtype)
    work, flops, left_out = (_small_step if recipe.data.image_size is None else _image_step)(recipe)
    ours = next(iter(work))
    timings = time_interleaved(work, rounds=arguments.rounds, seconds_per_round=arguments.seconds_per_round)
    title = f"one training step of {arguments.recipe}, batch {recipe.batch_size}, {recipe.dtype}"
    roofline = measure_roofline(jnp.dtype(recipe.dtype))
    write_report(arguments.workdir, [Measurement(title, timings, ours, flops)], left_out, command, roofline)


def _small_step(recipe: Any) -> tuple[dict[str, Any], int, list[str]]:
    """Alternatives, ours first; operations of a step; what is left out."""
    from pspinal_jax.benchmark.step import OURS, JaxStep, fake_data, step_flops, torch_steps

    data = fake_data()
    ours, by_call = JaxStep(recipe, data), JaxStep(recipe, data)
    work = {OURS: ours.run, "jitted step, Python loop": by_call.run_one_by_one}
    try:
        return work | torch_steps(recipe, data, ours), step_flops(recipe), []
    except ImportError:
        return work, step_flops(recipe), [NO_TORCH]


def _image_step(recipe: Any) -> tuple[dict[str, Any], int, list[str]]:
    """As `_small_step`."""
    from pspinal_jax.benchmark.image_step import OURS, ImageStep, fake_images, image_step_flops, torch_image_steps

    batch = fake_images(recipe)
    ours, flops = ImageStep(recipe, batch), image_step_flops(recipe)
    try:
        return {OURS: ours.run} | torch_image_steps(recipe, batch, ours), flops, []
    except ImportError:
        return {OURS: ours.run}, flops, [NO_TORCH]


def _head(arguments: HeadArguments, command: str) -> None:
    import jax.numpy as jnp

    from pspinal_jax.benchmark.head import SHAPES, Case, alternatives, check_equal, torch_alternatives
    from pspinal_jax.benchmark.report import Measurement, write_report
    from pspinal_jax.benchmark.roofline import measure_roofline
    from pspinal_jax.benchmark.timing import time_interleaved

    cases = [Case(shape, jnp.dtype(arguments.dtype)) for shape in SHAPES]
    measurements, left_out = [], []
    try:
        for case in cases:
            check_equal(case)
    except ImportError:
        left_out = [NO_TORCH]
    for case in cases:
        work = alternatives(case)
        ours = next(iter(work))
        if not left_out:
            work |= torch_alternatives(case)
        timings = time_interleaved(work, rounds=arguments.rounds, seconds_per_round=arguments.seconds_per_round)
        title = f"{case.shape}, {arguments.dtype}"
        measurements.append(Measurement(title, timings, ours, case.shape.flops))
    roofline = measure_roofline(jnp.dtype(arguments.dtype))
    write_report(arguments.workdir, measurements, left_out, command, roofline)


def _epoch(arguments: EpochArguments, command: str) -> None:
    from pspinal_jax.benchmark.epoch import OURS, jax_epochs, torch_epochs
    from pspinal_jax.benchmark.report import Measurement, write_report
    from pspinal_jax.benchmark.roofline import measure_roofline
    from pspinal_jax.benchmark.step import NUM_EXAMPLES, benchmark_recipe, fake_data, step_flops
    from pspinal_jax.benchmark.timing import time_interleaved

    recipe, data = benchmark_recipe("mnist-paper"), fake_data()
    work, left_out = jax_epochs(recipe, data), []
    try:
        work |= torch_epochs(recipe, data)
    except ImportError:
        left_out.append(NO_TORCH)
    timings = time_interleaved(work, rounds=arguments.rounds, seconds_per_round=arguments.seconds_per_round)
    flops = NUM_EXAMPLES // recipe.batch_size * step_flops(recipe)
    title = f"an epoch of mnist-paper, {NUM_EXAMPLES} images, batch {recipe.batch_size}, {recipe.dtype}"
    measurement = Measurement(title, timings, OURS, flops)
    write_report(arguments.workdir, [measurement], left_out, command, measure_roofline())


def _compile(arguments: CompileArguments, command: str) -> None:
    from pspinal_jax.benchmark.compile import report

    recipe, *flags = arguments.train
    words = [recipe, *(f"--{flag}" for flag in flags)]
    published = None if arguments.published_data is None else (arguments.published_data, arguments.published_epochs)
    report(arguments.workdir, words, arguments.rounds, command, published)


def _depth(arguments: DepthArguments, command: str) -> None:
    from pspinal_jax.benchmark.depth import report

    report(arguments.workdir, arguments.depths, arguments.rounds, command)


def _input(arguments: InputArguments, command: str) -> None:
    from pspinal_jax.benchmark.input import report

    report(arguments.workdir, arguments.pictures, arguments.workers, arguments.rounds, command)


def _compare(arguments: CompareArguments, command: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UsageError(f"benchmark compare has nothing to compare with. {NO_TORCH}") from None
    from pspinal_jax.benchmark.comparison import report

    report(arguments.workdir, arguments.trials, arguments.epochs, arguments.batch_size, arguments.heads, command)


_BENCHMARKS: dict[str, tuple[type[Any], Callable[[Any, str], None]]] = {
    "step": (StepArguments, _step),
    "head": (HeadArguments, _head),
    "epoch": (EpochArguments, _epoch),
    "compile": (CompileArguments, _compile),
    "depth": (DepthArguments, _depth),
    "input": (InputArguments, _input),
    "compare": (CompareArguments, _compare),
}
