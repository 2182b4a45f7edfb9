"""`pspinal-jax benchmark WHAT`: measure something beside other ways to do it."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pspinal_jax.benchmark import BENCHMARKS
from pspinal_jax.commands import naming_flags, table
from pspinal_jax.errors import UsageError
from pspinal_jax.files import check_target, expanded
from pspinal_jax.recipes.schema import BackboneName


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of all benchmarks, each of which has some of them; they become arguments of its cases."""

    workdir: Path
    """Where results.json, results.csv and results.png go."""
    rounds: int
    """How often each alternative is timed, in turn with the others."""
    seconds_per_round: float
    """About how long each timing takes; at least one repetition."""
    dtype: Literal["float32", "bfloat16"]
    """dtype to compute in."""
    recipe: str | None
    """Any recipe, or the path of a .py file with one, without its augmentation; by default mnist-paper, the head on 784
    pixels, or with a backbone kmnist-paper or caltech101-paper."""
    backbone: BackboneName | None
    """In place of the recipe's backbone."""
    image_size: int | None
    """Side of the images in pixels, of recipes of image files."""
    batch_size: int | None
    """Examples a step."""
    num_features: int | None
    """Length of the feature vectors: 1280 by default for recipes on features, 784 for the head."""
    num_classes: int | None
    """Number of classes."""
    layer_width: int | None
    """Width of the head's hidden layers; a size given, the others are 784, 128, 4, 10 and 64."""
    num_layers: int | None
    """Number of hidden layers."""
    train: tuple[str, ...]
    """The recipe and flags of `train`, flags written without their leading dashes as name=value: digits epochs=1."""
    published_data: Path | None
    """Time the MNIST row's published settings in PyTorch too, on this .npz file."""
    published_epochs: int
    """For so many epochs; the script has 50."""
    depths: tuple[int, ...]
    """Numbers of layers."""
    pictures: int
    """Images in a pass."""
    workers: int
    """Worker processes."""
    trials: int
    """Trials of every head, on both sides."""
    epochs: int
    """Passes of each."""
    heads: tuple[Literal["progressive", "spinal", "mlp", "dense"], ...]
    """The heads."""


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
"""The flags of each benchmark beside `workdir`, with their defaults."""


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
    """Every benchmark, each with its part of the time, as one report with tables and plots."""
    # argparse, since this one runs where nothing but JAX's own packages and PyTorch are installed.
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(message)

    example = "example: pspinal-jax benchmark all --tiny"
    parser = Parser(prog="pspinal-jax benchmark all", description=_all.__doc__, epilog=example)
    parser.add_argument("--minutes", type=float, default=8.0, help="about how long it may take (default: 8)")
    parser.add_argument("--workdir", type=expanded, default=Path("runs/benchmark-all"), help="where report.md goes")
    parser.add_argument("--sections", nargs="+", default=[], help="only these")
    parser.add_argument("--precisions", nargs="+", default=[], choices=("float32", "tf32", "bfloat16"))
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: a rehearsal, its figures mean nothing")
    parser.add_argument("--overwrite", action="store_true", help="write over the results in --workdir")
    parsed = vars(parser.parse_args(args))
    from pspinal_jax.benchmark.run import run_all

    return 1 if run_all(command=f"pspinal-jax benchmark all {shlex.join(args)}".strip(), **parsed) else 0
