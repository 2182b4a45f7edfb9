"""The seeds of a run on CPU, divided over one process a core.

Threads that wait for each other between a head's small products are slow; a process with one thread is not. Each
process trains its seeds as an ordinary run in seeds/FIRST-LAST of the run directory; in the end their checkpoints are
joined. One thread may round differently from several, so a run that has such folders always goes on in this mode.
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
import numpy as np

import pspinal_jax
from pspinal_jax.checkpoints import CheckpointStore, read_newest
from pspinal_jax.errors import RunError
from pspinal_jax.progress import progress_bar
from pspinal_jax.recipes.schema import Recipe, RunOptions
from pspinal_jax.runs.build import RunSetup
from pspinal_jax.runs.directory import MetricsWriter, RunDirectory
from pspinal_jax.training.programs import SeedStates
from pspinal_jax.training.signals import Stopped, StopRequest
from pspinal_jax.training.stages import TrainingProgress

# Examples seen in training by all seeds, from which on processes gain more than their start costs (some 3 s).
_MIN_EXAMPLES = 2_000_000
_POLL_SECONDS = 0.2
_SECONDS_TO_SAVE = 60
_WORKER = "from pspinal_jax.runs.train import train_part; train_part()"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seeds_of(part: Path) -> range:
    """Which of the run's seeds, by index, the directory `part` trains."""
    first, last = map(int, part.name.split("-"))
    return range(first, last + 1)


def find_parts(run: Path) -> list[RunDirectory]:
    """The runs that the seeds of `run` are divided into, by their first seed; [] for a run of one process."""
    folders = [path for path in run.glob("seeds/*-*") if path.is_dir()]
    return [RunDirectory(path) for path in sorted(folders, key=lambda path: seeds_of(path).start)]


def _make_parts(run: Path, num_seeds: int) -> list[RunDirectory]:
    count, new = min(cores(), num_seeds), run / "seeds.part"
    shutil.rmtree(new, ignore_errors=True)
    for first, end in itertools.pairwise(num_seeds * index // count for index in range(count + 1)):
        (new / f"{first}-{end - 1}").mkdir(parents=True)
    new.rename(run / "seeds")  # all of them, or none after a kill
    return find_parts(run)


def can_use_processes(recipe: Recipe, options: RunOptions) -> bool:
    """Whether processes can train the seeds of `recipe`: small models on arrays, on the CPU of one machine."""
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    small = recipe.model.backbone == "none" and recipe.data.image_size is None
    return alone and small and recipe.patience == 0 and options.init_from is None and recipe.num_seeds > 1


def wants_processes(recipe: Recipe, setup: RunSetup, options: RunOptions) -> bool:
    """Whether to train the seeds of a new run in processes."""
    seen = recipe.num_seeds * recipe.epochs * sum(len(stage.subset) for stage in setup.stages)
    long = recipe.seed_mode == "auto" and cores() > 1 and seen >= _MIN_EXAMPLES
    return (recipe.seed_mode == "processes" or long) and can_use_processes(recipe, options)


def train_in_processes(
    setup: RunSetup, checkpoint_seconds: float, metrics: MetricsWriter, store: CheckpointStore, stop: StopRequest
) -> None:
    """Train all seeds, or what is left of that, and leave one finished checkpoint of all in the empty `store`.

    Raises:
      Stopped: when the user asks to stop, once each process has saved.
      RunError: the reason for which a process failed.
    """
    run, config = metrics.directory.path, setup.config
    parts = find_parts(run) or _make_parts(run, config.num_seeds)
    metrics.rewind([])
    epochs, written = config.epochs * len(setup.stages), 0
    with _processes(parts, checkpoint_seconds) as processes, progress_bar(epochs, "seeds", "epoch", True) as bar:
        running = [True] * len(parts)
        while any(running):
            time.sleep(_POLL_SECONDS)
            running = [process.poll() is None for process in processes]
            if stop.received:
                raise Stopped(stop.received.name)
            for part, process in zip(parts, processes, strict=True):
                if process.returncode:
                    reason = Path(f"{part.path}.log").read_text(errors="replace").splitlines()[-1:]
                    raise RunError("".join(reason) or f"{part.path} ended with status {process.returncode}")
            lines = _new_lines(parts, running, written)
            for line in lines:
                metrics.append(line)
            bar.update(len(lines))
            written += len(lines)
    shapes = jax.eval_shape(SeedStates(setup.programs, list(range(config.num_seeds))).trees)
    trees, progress = _join(parts, shapes)
    store.save(progress.serial, trees, dataclasses.asdict(progress))
    store.finish()
    shutil.rmtree(run / "seeds")


@contextlib.contextmanager
def _processes(parts: Sequence[RunDirectory], checkpoint_seconds: float) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process for each part, which saves and ends with the `with`, or dies with this process."""
    paths = [str(Path(pspinal_jax.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    environment["PJRT_NPROC"] = "1"  # XLA's number of threads on CPU
    started = list[subprocess.Popen[bytes]]()
    try:
        for part in parts:
            command = [sys.executable, "-P", "-c", _WORKER, str(part.path.absolute()), str(checkpoint_seconds)]
            with open(f"{part.path}.log", "wb") as log:  # its last line is the reason for a failure
                # The worker ends where its standard input does. Ctrl-C reaches this process alone.
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
                )
            started.append(process)
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_SAVE)
            process.kill()
            process.communicate()


def _new_lines(parts: Sequence[RunDirectory], running: Sequence[bool], written: int) -> list[dict[str, Any]]:
    """The lines from `written` on that no part will add to."""
    histories = [part.metrics() for part in parts]
    # Parts that train again for fewer epochs than others end before them.
    lengths = [len(lines) for lines, runs in zip(histories, running, strict=True) if runs]
    count = min(lengths) if lengths else max(map(len, histories))
    sizes = [len(seeds_of(part.path)) for part in parts]
    return [join_lines(row, sizes) for row in list(itertools.zip_longest(*histories, fillvalue={}))[written:count]]


def join_lines(lines: Sequence[dict[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """An epoch's line of all seeds, from those of parts of these sizes; {} stands for a part that has ended."""
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for line in lines for name in line):
        present = [line[name] for line in lines if name in line]
        if name in ("stage", "epoch", "step", "seconds", "compile_seconds", "input_seconds", "peak_memory_mb"):
            joined[name] = max(present)  # the first three are equal, the others those of the slowest part
        elif name in ("examples_per_second", "flops_per_second", "share_of_peak"):
            joined[name] = round(sum(present), 4 if name == "share_of_peak" else 1)
        else:
            joined[name] = []
            for line, size in zip(lines, sizes, strict=True):
                value = line.get(name, 0 if name == "skipped_steps" else None)  # it is not written where it is 0
                joined[name] += value if isinstance(value, list) else [value] * size
    return joined


def _join(parts: Sequence[RunDirectory], shapes: Any) -> tuple[dict[str, Any], TrainingProgress]:
    """The trees, of these shapes, and the progress of all seeds, from the parts' last checkpoints."""
    trees, progresses = [], []
    for part in parts:
        size = len(seeds_of(part.path))
        lead = (size,) if size > 1 else ()
        like = jax.tree.map(lambda leaf, lead=lead: np.empty((*lead, *leaf.shape[1:]), leaf.dtype), shapes)
        tree, progress = read_newest(part.checkpoints_path, lambda _, like=like: like)  # type: ignore[misc]
        trees.append(tree if lead else jax.tree.map(lambda leaf: leaf[None], tree))
        progresses.append(progress)
    joined = dict(max(progresses, key=lambda progress: progress["lines"]))
    for name, value in joined.items():
        if isinstance(value, list):
            joined[name] = [of_seed for progress in progresses for of_seed in progress[name]]
    joined |= {"total_seconds": max(progress["total_seconds"] for progress in progresses), "processes": len(parts)}
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees), TrainingProgress(**joined)
