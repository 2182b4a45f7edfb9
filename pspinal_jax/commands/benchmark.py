"""`pspinal-jax benchmark WHAT`: timings of our programs, compared with alternatives."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pspinal_jax.benchmark import BENCHMARKS, SECTIONS
from pspinal_jax.commands import naming_flags, table
from pspinal_jax.errors import UsageError
from pspinal_jax.files import check_target, expanded
from pspinal_jax.recipes.schema import BackboneName


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of all benchmarks. Each benchmark has some of them, which become arguments of its cases."""

    workdir: Path
    """Folder for results.json, results.csv and results.png."""
    rounds: int
    """Number of timings of each alternative, in turn with the others."""
    seconds_per_round: float
    """Approximate duration of each timing, of at least one repetition."""
    dtype: Literal["float32", "bfloat16"]
    """dtype of computations."""
    recipe: str | None
    """Recipe to time, or the path of a .py file with one, without augmentation; by default mnist-paper (the head on 784
    pixels) or, with a backbone, kmnist-paper or caltech101-paper."""
    backbone: BackboneName | None
    """Backbone to use instead of the recipe's."""
    image_size: int | None
    """Side of the images in pixels, for recipes of image files."""
    batch_size: int | None
    """Number of examples per step."""
    num_features: int | None
    """Length of the feature vectors, by default 1280 for recipes on features and 784 for the head."""
    num_classes: int | None
    """Number of classes."""
    layer_width: int | None
    """Width of the head's hidden layers. If you give one size, the others are 784, 128, 4, 10 and 64."""
    num_layers: int | None
    """Number of hidden layers."""
    train: tuple[str, ...]
    """Recipe and flags of `train`, with flags written as name=value without leading dashes: digits epochs=1."""
    published_data: Path | None
    """An .npz file on which to also time the MNIST row's published settings in PyTorch."""
    published_epochs: int
    """Number of epochs of the published settings; the script has 50."""
    depths: tuple[int, ...]
    """Numbers of layers."""
    pictures: int
    """Number of images in a pass."""
    workers: int
    """Number of worker processes."""
    trials: int
    """Number of trials of every head, in JAX and in PyTorch."""
    epochs: int
    """Number of epochs of each trial."""
    heads: tuple[Literal["progressive", "spinal", "mlp", "dense"], ...]
    """Heads to train."""


_COMPUTED = {"rounds": 7, "seconds_per_round": 0.2, "dtype": "float32"}
_SIZES = ("num_features", "num_classes", "batch_size")
_STEP = dict.fromkeys(("recipe", "backbone", "image_size", *_SIZES)) | {"rounds": 15, "seconds_per_round": 0.4}
DEFAULTS: dict[str, dict[str, Any]] = dict.fromkeys(BENCHMARKS, _COMPUTED) | {
    "step": _COMPUTED | _STEP,
    "head": _COMPUTED | {"rounds": 11} | dict.fromkeys(("layer_width", "num_layers", *_SIZES)),
    "epoch": {"rounds": 5, "seconds_per_round": 1.0},
    "compile": {"rounds": 3, "train": ("digits",), "published_data": None, "published_epochs": 50},
    "depth": {"rounds": 3, "depths": (4, 16, 64, 256)},
    "input": {"rounds": 5, "pictures": 4800, "workers": 2},
    "compare": {"trials": 4, "epochs": 20, "batch_size": 64, "heads": ("progressive", "spinal", "mlp", "dense")},
}
"""The flags of each benchmark besides `workdir`, with their defaults."""


def benchmark(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        rows = [(f"  {name}", each.title) for name, each in BENCHMARKS.items()] + [("  all", str(_all.__doc__))]
        print(f"usage: pspinal-jax benchmark WHAT [flags]\n\n{table(rows)}\n\nexample: pspinal-jax benchmark step")
        return 0 if args else UsageError.exit_status
    name, *flags = args
    if name == "all":
        return _all(flags)
    if name not in BENCHMARKS:
        raise UsageError(f"unknown benchmark {name!r}; there are: {', '.join(BENCHMARKS)}, all")
    from pspinal_jax.commands.parse import field_of, flags_of, parse
    from pspinal_jax.environment import check_platform

    known = {flag.attribute: flag for flag in flags_of(Flags)}
    defaults = {"workdir": Path(f"runs/benchmark-{name}")} | DEFAULTS[name]
    arguments = dataclasses.make_dataclass("Arguments", [field_of(known[flag], defaults[flag]) for flag in defaults])
    parsed = parse(arguments, flags, f"benchmark {name}", "", description=BENCHMARKS[name].title)
    check_target(parsed.workdir, "work directory", "results.json", "results.csv")
    check_platform()
    from pspinal_jax.benchmark.run import run_alone

    with naming_flags():
        run_alone(name, command=f"pspinal-jax benchmark {shlex.join(args)}", **vars(parsed))
    return 0


def _all(args: Sequence[str]) -> int:
    """Run all benchmarks, each for part of the time, and write one report."""
    # argparse, since this command also runs where only JAX's own packages and PyTorch are installed.
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(message)

    parser = Parser(
        prog="pspinal-jax benchmark all",
        usage="pspinal-jax benchmark all [-h] [OPTIONS]",
        description=f"{_all.__doc__}\n\nsections:\n{table((f'  {name}', BENCHMARKS[name].title) for name in SECTIONS)}",
        epilog="example: pspinal-jax benchmark all --tiny",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
    )
    names, workdir, flag = ("float32", "tf32", "bfloat16"), Path("runs/benchmark-all"), parser.add_argument
    flag("--minutes", type=float, default=8.0, metavar="FLOAT", help="Approximate duration. (default: 8.0)")
    about = f"Folder for report.md. (default: {workdir})"
    flag("--workdir", type=expanded, default=workdir, metavar="PATH", help=about)
    flag("--sections", nargs="+", default=[], metavar="NAME", help="Sections to run. (default: all of the above)")
    about = f"Some of {', '.join(names)}. (default: those of the device)"
    flag("--precisions", nargs="+", default=[], metavar="NAME", choices=names, help=about)
    flag("--tiny", action="store_true", help="Use the smallest sizes, for a trial run whose figures mean nothing.")
    flag("--overwrite", action="store_true", help="Replace the results in --workdir.")
    parsed = vars(parser.parse_args(args))
    from pspinal_jax.benchmark.run import run_all

    return 1 if run_all(command=f"pspinal-jax benchmark all {shlex.join(args)}".strip(), **parsed) else 0
