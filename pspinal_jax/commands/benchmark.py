"""`pspinal-jax benchmark step`: time a training step beside its peers."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from pspinal_jax.commands.parse import parse
from pspinal_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class StepArguments:
    """Arguments of `benchmark step`."""

    workdir: Path = Path("runs/benchmark-step")
    """Where results.json and results.png go."""
    rounds: int = 15
    """How often each alternative is timed, in turn with the others."""
    seconds_per_round: float = 0.4
    """About how long each timing takes."""


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: pspinal-jax benchmark step [flags]\n\n  step  one training step of mnist-paper beside its peers")
        return 0 if args else UsageError.exit_status
    if args[0] != "step":
        raise UsageError(f"unknown benchmark {args[0]!r}; there is: step")
    parsed = parse(
        StepArguments,
        args[1:],
        prog="pspinal-jax benchmark step",
        description="Time one training step of mnist-paper inside the compiled epoch, beside its peers.",
        default=StepArguments(),
    )
    return _step(parsed, f"pspinal-jax benchmark {shlex.join(args)}")


def _step(arguments: StepArguments, command: str) -> int:
    from pspinal_jax.benchmark.report import write_report
    from pspinal_jax.benchmark.step import OURS, JaxStep, fake_data, torch_steps
    from pspinal_jax.benchmark.timing import time_interleaved
    from pspinal_jax.recipes import load_recipe

    recipe, data = load_recipe("mnist-paper"), fake_data()
    ours, by_call = JaxStep(recipe, data), JaxStep(recipe, data)
    work = {OURS: ours.run, "jitted step, Python loop": by_call.run_one_by_one}
    left_out = []
    try:
        work |= torch_steps(recipe, data, ours)
    except ImportError:
        left_out.append("PyTorch eager and torch.compile: torch is not installed (extra `torch`)")
    timings = time_interleaved(work, rounds=arguments.rounds, seconds_per_round=arguments.seconds_per_round)
    title = f"one training step of mnist-paper, batch {recipe.batch_size}, {recipe.dtype}"
    write_report(arguments.workdir, title, timings, OURS, left_out, command)
    return 0
