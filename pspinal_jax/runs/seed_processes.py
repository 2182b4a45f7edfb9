"""The seeds of a run side by side on CPU: a process a core, each with its share of the seeds.

Between the small products of a head two threads wait for each other; a process that keeps to one core does not. It
has one thread, if its sums then round as the loop's do, which its first steps show, or else as many as the loop. Each
process trains its seeds in a loop, with checkpoints of its own in the run directory (seeds/FIRST-LAST). At the end they
become one checkpoint, as the loop over all seeds would have saved it.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pspinal_jax
from pspinal_jax.checkpoints import CheckpointStore, read_newest
from pspinal_jax.errors import RunError
from pspinal_jax.recipes.options import RunOptions
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.build import RunSetup
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.metrics import MetricsWriter
from pspinal_jax.runs.seed_rounding import first_steps_checksum
from pspinal_jax.training.loop import Trainer, abstract_trees
from pspinal_jax.training.signals import Stopped, StopRequest
from pspinal_jax.training.stages import TrainingProgress

_FOLDER = "seeds"
_LEAST_EXAMPLES = 2_000_000
"""Seen in training, by all seeds together: processes take some 3 s to start, which fewer do not bring in again."""
POLL_SECONDS = 0.2
_SECONDS_TO_SAVE = 60
_THREADS = "PJRT_NPROC"
"""XLA's environment variable for the number of its threads on CPU."""
STOPPED = 75  # sysexits' EX_TEMPFAIL: try again
ROUNDS_OTHERWISE = 76
"""Status of a process whose one thread rounds otherwise than the loop."""
_PART_FIELDS = ("seconds", "compile_seconds", "input_seconds")
"""Of an epoch's line: the slowest process's; examples_per_second adds up, lists by seed are joined."""


class RoundsOtherwiseError(Exception):
    """The first steps of a process of one thread are not, bit for bit, the loop's."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The seeds of one process.

    Attributes:
      directory: its checkpoints and metrics.
      first: index of its first seed among the run's.
      count: how many.
    """

    directory: RunDirectory
    first: int
    count: int

    @property
    def selected_path(self) -> Path:
        """Where it writes the last epoch that any of its seeds selected, for the others to read."""
        return self.directory.path / "selected.json"

    @property
    def error_path(self) -> Path:
        """Where it writes what it ended with."""
        return self.directory.path / "error.txt"


def cores() -> list[int]:
    """The cores that this process may use, where the system can keep a process to one; else none."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def find_parts(run: RunDirectory) -> list[Part]:
    """The parts that the run in `run` has been cut into, [] if it has not."""
    parts = []
    for path in (run.path / _FOLDER).glob("*-*"):
        first, last = path.name.split("-")
        parts.append(Part(RunDirectory(path), int(first), int(last) - int(first) + 1))
    return sorted(parts, key=lambda part: part.first)


def make_parts(run: RunDirectory, num_seeds: int, num_processes: int) -> list[Part]:
    """As even parts as can be; their folders are made, all or, after a kill, none."""
    folder, new = run.path / _FOLDER, run.path / f"{_FOLDER}.part"
    shutil.rmtree(new, ignore_errors=True)
    bounds = [num_seeds * index // num_processes for index in range(num_processes + 1)]
    for first, end in itertools.pairwise(bounds):
        (new / f"{first}-{end - 1}").mkdir(parents=True)
    new.rename(folder)
    return find_parts(run)


def wants_processes(recipe: Recipe, setup: RunSetup, run: RunDirectory, options: RunOptions) -> bool:
    """Whether the seeds of a run that has no checkpoint yet are to be trained by a process a core."""
    if not can_use_processes(recipe, options):
        return False
    if recipe.seed_mode == "processes" or find_parts(run):
        return True
    seen = recipe.num_seeds * recipe.epochs * sum(len(stage.subset) for stage in setup.stages)
    return recipe.seed_mode == "auto" and len(cores()) > 1 and seen >= _LEAST_EXAMPLES


def can_use_processes(recipe: Recipe, options: RunOptions) -> bool:
    """Whether processes could train the seeds of `recipe`: small models on arrays, on the CPU of one machine."""
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    small = recipe.model.backbone == "none" and recipe.data.image_size is None
    # With patience all seeds train until the last of them has lost it.
    apart = recipe.patience == 0 and options.init_from is None
    return alone and small and apart and recipe.num_seeds > 1


def train_in_processes(
    recipe: Recipe,
    setup: RunSetup,
    options: RunOptions,
    metrics: MetricsWriter,
    store: CheckpointStore,
    stop: StopRequest,
) -> None:
    """Train all seeds, or what is left of that, and leave one finished checkpoint of all in `store`.

    Args:
      recipe: the run's.
      setup: what the run works with.
      options: the run's.
      metrics: the run's; lines of all seeds are written as their epochs end.
      store: the run's checkpoints, of which there is none yet.
      stop: whether the user asks to stop.

    Raises:
      Stopped: when the user does, once each process has saved.
      RunError: what a process ended with.
    """
    run = metrics.directory
    parts = find_parts(run) or make_parts(run, recipe.num_seeds, max(1, min(len(cores()), recipe.num_seeds)))
    metrics.rewind([])
    try:
        _run_parts(parts, options, metrics, stop, first_steps_checksum(setup))
    except RoundsOtherwiseError:  # nothing has been trained yet
        _run_parts(parts, options, metrics, stop, None)
    trainer = Trainer(setup, metrics, store, stop, options.checkpoint_seconds)
    trees, progress = _join(parts, setup, jax.eval_shape(trainer.seed_states.trees))
    store.save(progress.serial, trees, dataclasses.asdict(progress))
    store.finish()
    shutil.rmtree(run.path / _FOLDER)


def _run_parts(
    parts: Sequence[Part], options: RunOptions, metrics: MetricsWriter, stop: StopRequest, first_steps: str | None
) -> None:
    """Run the parts' processes to their end; raises as `train_in_processes`.

    Args:
      parts: what is trained.
      options: the run's.
      metrics: the run's.
      stop: whether the user asks to stop.
      first_steps: `first_steps_checksum` of this process, for processes of one thread; None for as many threads.
    """
    written = 0
    with _processes(metrics.directory, parts, options, first_steps) as processes:
        while True:
            running = [process.poll() is None for process in processes]
            written += _append_lines(parts, metrics, written)
            if stop.received:
                raise Stopped(stop.received.name)
            _raise_failure(parts, processes)
            if not any(running):
                return
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _processes(
    run: RunDirectory, parts: Sequence[Part], options: RunOptions, first_steps: str | None
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process a part, which ends with the `with`: it saves and stops, or dies with this process."""
    places, started = cores(), list[subprocess.Popen[bytes]]()
    ours = [str(Path(pspinal_jax.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, ours))}
    if first_steps is not None:
        environment[_THREADS] = "1"
    try:
        for index, part in enumerate(parts):
            part.error_path.unlink(missing_ok=True)
            core = places[index % len(places)] if places else -1
            numbers = (part.first, part.count, core, options.checkpoint_seconds, first_steps or "-")
            command = [
                sys.executable,
                "-P",
                "-m",
                "pspinal_jax.runs.seed_worker",
                str(run.path.absolute()),
                *map(str, numbers),
            ]
            started.append(
                subprocess.Popen(
                    command,
                    # When this process is gone, so is the other end of the pipe, and they see that.
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    # The parts are alike: one bar speaks for all.
                    stderr=None if index == 0 else subprocess.DEVNULL,
                    # The terminal's Ctrl-C is for this process, which passes it on once.
                    start_new_session=True,
                    env=environment,
                )
            )
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_SAVE)
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _raise_failure(parts: Sequence[Part], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for part, process in zip(parts, processes, strict=True):
        if process.poll() in (None, 0):
            continue
        if process.returncode == STOPPED:  # somebody asked it and not us
            raise Stopped(f"the process of seeds {part.directory.path.name}, which was asked to stop")
        if process.returncode == ROUNDS_OTHERWISE:
            raise RoundsOtherwiseError
        with contextlib.suppress(OSError):
            raise RunError(part.error_path.read_text().strip())
        raise RunError(
            f"the process of seeds {part.directory.path.name} ended with status {process.returncode}; give the same "
            "command to go on, or --seed-mode loop in another --workdir"
        )


def _append_lines(parts: Sequence[Part], metrics: MetricsWriter, written: int) -> int:
    """Write the lines that all parts have come to; how many these were."""
    theirs = [part.directory.metrics()[written:] for part in parts]
    new = list(zip(*theirs, strict=False))
    for lines in new:
        metrics.append(_join_lines(lines, parts))
    return len(new)


def _join_lines(lines: Sequence[dict[str, Any]], parts: Sequence[Part]) -> dict[str, Any]:
    joined = {}
    for name in dict.fromkeys(name for line in lines for name in line):
        # Only a part that has left out a step in this epoch says so.
        values: list[Any] = [line.get(name, 0 if name == "skipped_steps" else None) for line in lines]
        if name in ("stage", "epoch", "step"):
            joined[name] = values[0]
        elif name in _PART_FIELDS:
            joined[name] = max(value or 0 for value in values)
        elif name == "examples_per_second":
            joined[name] = round(sum(values), 1)
        else:
            joined[name] = [
                value for each, part in zip(values, parts, strict=True) for value in _listed(each, part.count)
            ]
    return joined


def _listed(value: Any, count: int) -> list[Any]:
    return value if isinstance(value, list) else [value] * count


def _join(parts: Sequence[Part], setup: RunSetup, shapes: Any) -> tuple[dict[str, Any], TrainingProgress]:
    """The trees and the progress of all seeds, from the parts' newest checkpoints.

    Args:
      parts: finished ones, that hold all seeds.
      setup: the run's.
      shapes: of the trees of all seeds.

    Raises:
      RunError: if a checkpoint cannot be read.
    """
    trees, progresses = [], []
    for part in parts:
        wanted = _shapes(part, setup, shapes)
        found, progress = read_newest(part.directory.checkpoints_path, lambda _, wanted=wanted: wanted)  # type: ignore[misc]
        trees.append(found if part.count > 1 else jax.tree.map(lambda leaf: leaf[None], found))
        progresses.append(progress)
    joined = dict(progresses[0])
    for name, value in joined.items():
        if isinstance(value, list):
            joined[name] = [of_seed for progress in progresses for of_seed in progress[name]]
    joined |= {"total_seconds": max(progress["total_seconds"] for progress in progresses)}
    whole = TrainingProgress(**joined | {"longest": 0, "processes": len(parts)})
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees), whole


def _shapes(part: Part, setup: RunSetup, shapes: Any) -> Any:
    """What to restore of `part`, from the `shapes` of all seeds."""
    lead = (part.count,) if part.count > 1 else ()
    cut = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape[1:]), leaf.dtype), shapes)
    return abstract_trees(cut, part.count, setup.programs)
