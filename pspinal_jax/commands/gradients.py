"""`pspinal-jax gradients`: does the progressive head give gradients a short path to every layer?"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class GradientsArguments:
    """Gradient norms at the features and at every layer, from initialisation through training, by depth."""

    workdir: Path = Path("runs/gradients")
    """Where results.json and results.png go."""
    data_path: Annotated[Path | None, tyro.conf.arg(name="data.path")] = None
    """An .npz file with train_images (or 2-D float features), train_labels, test_images and test_labels; by default
    scikit-learn's 8x8 digits."""
    depths: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Numbers of hidden layers."""
    width: int = 16
    """Width of each hidden layer."""
    num_seeds: int = 5
    """Initialisations and orders, seeds 0 .. num_seeds - 1."""
    epochs: int = 20
    """Epochs of training; 0 measures the initialisation only."""
    every: int = 5
    """Epochs between two measurements."""
    batch_size: int = 64
    """Examples per training step."""
    learning_rate: float = 0.05
    """Of SGD with momentum 0.9."""
    norm: Literal["none", "batch"] = "none"
    """Batch norm in every hidden layer."""
    max_examples: int = 2000
    """At most so many training and so many test examples are used, drawn with seed 0."""

    def __post_init__(self) -> None:
        for name in ("width", "num_seeds", "every", "batch_size", "max_examples"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(bool(self.depths) and min(self.depths) >= 1, "depths", self.depths, "one or more, each at least 1")
        _require(len(set(self.depths)) == len(self.depths), "depths", self.depths, "each depth once")
        _require(self.epochs >= 0, "epochs", self.epochs, "at least 0")
        _require(0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "above 0")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}, expected {expected}")


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    arguments = parse(
        GradientsArguments,
        args,
        prog="pspinal-jax gradients",
        description=str(GradientsArguments.__doc__),
        example="pspinal-jax gradients",
        default=GradientsArguments(),
    )
    from pspinal_jax.environment import enable_compilation_cache
    from pspinal_jax.studies.gradient_report import open_workdir, read_examples, report
    from pspinal_jax.studies.gradient_study import Study

    names = {field.name for field in dataclasses.fields(Study)}
    given = {name: value for name, value in dataclasses.asdict(arguments).items() if name in names}
    study = Study(**{**given, "depths": tuple(sorted(arguments.depths)), "norm": _norm(arguments)})
    examples, source = read_examples(arguments.data_path, arguments.max_examples, study.batch_size)
    open_workdir(arguments.workdir)
    enable_compilation_cache()
    report(arguments.workdir, study, examples, source, f"pspinal-jax gradients {shlex.join(args)}".strip())
    return 0


def _norm(arguments: GradientsArguments) -> Literal["batch"] | None:
    return "batch" if arguments.norm == "batch" else None
