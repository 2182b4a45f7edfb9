"""`pspinal-jax benchmark WHAT`: measure something beside other ways to do it."""

import contextlib
import dataclasses
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pspinal_jax.benchmark import BENCHMARKS
from pspinal_jax.errors import UsageError
from pspinal_jax.files import check_target, expanded


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The flags of every benchmark."""

    workdir: Path
    """Where results.json and results.png go."""


@dataclasses.dataclass(frozen=True)
class Rounds(Arguments):
    """The flags of what is repeated."""

    rounds: int = 7
    """How often each alternative is timed, in turn with the others."""


@dataclasses.dataclass(frozen=True)
class Timed(Rounds):
    """The flags of what is repeated for a while."""

    seconds_per_round: float = 0.2
    """About how long each timing takes; at least one repetition."""


@dataclasses.dataclass(frozen=True)
class Computed(Timed):
    """The flags of what is computed in a dtype."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype to compute in."""


@dataclasses.dataclass(frozen=True)
class StepArguments(Computed):
    """The flags of `benchmark step`."""

    recipe: Literal["mnist-paper", "kmnist-paper", "caltech101-paper"] = "mnist-paper"
    """mnist-paper: the head on 784 pixels; kmnist-paper: VGG-5 and head; caltech101-paper: Wide-ResNet-101-2 and head
    on colour images. Without augmentation."""
    batch_size: int | None = None
    """Examples a step; the recipe's by default."""


@dataclasses.dataclass(frozen=True)
class CompileArguments(Rounds):
    """The flags of `benchmark compile`."""

    train: tuple[str, ...] = ("digits",)
    """The recipe and flags of `train`, flags written without their leading dashes as name=value: digits epochs=1."""
    published_data: Path | None = None
    """Time the MNIST row's published settings in PyTorch too, on this .npz file."""
    published_epochs: int = 50
    """For so many epochs; the script has 50."""


@dataclasses.dataclass(frozen=True)
class DepthArguments(Rounds):
    """The flags of `benchmark depth`."""

    depths: tuple[int, ...] = (4, 16, 64, 256)
    """Numbers of layers."""


@dataclasses.dataclass(frozen=True)
class InputArguments(Rounds):
    """The flags of `benchmark input`."""

    pictures: int = 4800
    """Images in a pass."""
    workers: int = 2
    """Worker processes."""


@dataclasses.dataclass(frozen=True)
class CompareArguments(Arguments):
    """The flags of `benchmark compare`."""

    trials: int = 4
    """Trials of every head, on both sides."""
    epochs: int = 20
    """Passes of each."""
    batch_size: int = 64
    """Examples a step."""
    heads: tuple[Literal["progressive", "spinal", "mlp", "dense"], ...] = ("progressive", "spinal", "mlp", "dense")
    """The heads."""


def _flags(name: str) -> Any:
    """The flags of a benchmark with their defaults; they become arguments of `run_alone` and of its cases."""
    workdir = Path(f"runs/benchmark-{name}")
    made: dict[str, Any] = {
        "step": StepArguments(workdir, rounds=15, seconds_per_round=0.4),
        "head": Computed(workdir, rounds=11),
        "epoch": Timed(workdir, rounds=5, seconds_per_round=1.0),
        "compile": CompileArguments(workdir, rounds=3),
        "depth": DepthArguments(workdir, rounds=3),
        "input": InputArguments(workdir, rounds=5),
        "compare": CompareArguments(workdir),
    }
    return made.get(name, Computed(workdir))


def benchmark(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        titles = {name: benchmark.title for name, benchmark in BENCHMARKS.items()} | {"all": str(_all.__doc__)}
        width = max(map(len, titles))
        lines = [f"  {name.ljust(width)}  {title}" for name, title in titles.items()]
        usage = ["usage: pspinal-jax benchmark WHAT [flags]", "", *lines, "", "example: pspinal-jax benchmark step"]
        print("\n".join(usage))
        return 0 if args else UsageError.exit_status
    name, *flags = args
    if name == "all":
        return _all(flags)
    if name not in BENCHMARKS:
        raise UsageError(f"unknown benchmark {name!r}; there are: {', '.join(BENCHMARKS)}, all")
    from pspinal_jax.commands.parse import parse
    from pspinal_jax.environment import check_platform

    default = _flags(name)
    parsed = parse(
        type(default),
        flags,
        prog=f"pspinal-jax benchmark {name}",
        description=BENCHMARKS[name].title,
        example=f"pspinal-jax benchmark {name}",
        default=default,
    )
    check_target(parsed.workdir, "work directory", "results.json")
    check_platform()
    from pspinal_jax.benchmark.run import run_alone

    given = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)}
    run_alone(name, command=f"pspinal-jax benchmark {shlex.join(args)}", **given)
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
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            parsed = parser.parse_args(args)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(errors.getvalue().strip().splitlines()[-1].split("error: ")[-1]) from None
    from pspinal_jax.benchmark.run import run_all

    command = f"pspinal-jax benchmark all {shlex.join(args)}".strip()
    failed = run_all(
        parsed.workdir, parsed.minutes, command, parsed.sections, parsed.precisions, parsed.tiny, parsed.overwrite
    )
    return 1 if failed else 0
