"""The process of one part of a run's seeds, which seed_processes.py starts."""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from pspinal_jax.checkpoints import CheckpointStore
from pspinal_jax.data import load_data
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import PSpinalError, printable
from pspinal_jax.files import write_json
from pspinal_jax.log_filter import absl_quietened
from pspinal_jax.models.build import build_model
from pspinal_jax.progress import say
from pspinal_jax.runs.build import set_up
from pspinal_jax.runs.directory import RunDirectory, load_recipe_of
from pspinal_jax.runs.metrics import MetricsWriter
from pspinal_jax.runs.seed_processes import (
    POLL_SECONDS,
    ROUNDS_OTHERWISE,
    STOPPED,
    Part,
    RoundsOtherwiseError,
    find_parts,
)
from pspinal_jax.runs.seed_rounding import first_steps_checksum
from pspinal_jax.training.loop import Trainer
from pspinal_jax.training.signals import Stopped, StopRequest


def main(arguments: Sequence[str]) -> int:
    """Train a part's seeds; the exit status.

    Arguments: run directory, first seed, number of seeds, core, seconds between checkpoints, and the first steps'
    checksum that is asked for, or '-' for none.
    """
    path, first, count, core, seconds, first_steps = arguments
    run = RunDirectory(Path(path))
    part = next(part for part in find_parts(run) if (part.first, part.count) == (int(first), int(count)))
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    try:
        _train_part(run, part, int(core), float(seconds), first_steps)
    except Stopped:
        return STOPPED
    except RoundsOtherwiseError:
        return ROUNDS_OTHERWISE
    except (PSpinalError, OSError, MemoryError) as error:
        with contextlib.suppress(OSError):
            part.error_path.write_text(printable(error) or type(error).__name__)
        return 1
    return 0


def _train_part(run: RunDirectory, part: Part, core: int, checkpoint_seconds: float, first_steps: str) -> None:
    config = run.config()
    for name, value in config["identity"]["jax"].items():
        jax.config.update(f"jax_{name}", value)
    with StopRequest() as stop:
        enable_compilation_cache()  # which makes JAX's threads, as many as it was started for
        _keep_to(core)
        whole = load_recipe_of(config)
        recipe = dataclasses.replace(
            whole, seed=whole.seed + part.first, num_seeds=part.count, seed_mode="loop", mesh=type(whole.mesh)()
        )
        data = load_data(recipe.data, config["class_names"])
        model = build_model(recipe, data.example_shape, data.num_classes)
        setup = set_up(recipe, model, data)
        if first_steps not in ("-", first_steps_checksum(setup)):
            raise RoundsOtherwiseError
        with (
            part.directory.held(),
            CheckpointStore(part.directory.checkpoints_path) as store,
            MetricsWriter(part.directory) as metrics,
        ):
            trainer = Trainer(setup, metrics, store, stop, checkpoint_seconds)
            trainer.longest = _longest(run, part, trainer.stop_if_asked)
            trainer.run()


def _keep_to(core: int) -> None:
    """Keep JAX's threads to `core`. The compiler goes on seeing all cores, which it asks the thread that calls it for:
    what it cuts into pieces for them is cut as in the loop, and its programs can lie in one cache.
    """
    for thread in Path("/proc/self/task").iterdir() if core >= 0 else ():
        if int(thread.name) != threading.get_native_id():
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread.name), {core})


def _longest(run: RunDirectory, part: Part, stop_if_asked: Callable[[], None]) -> Callable[[int], int]:
    """The epochs to retrain for: as many as any seed of the run selected, those of other processes included."""

    def longest(own: int) -> int:
        write_json(part.selected_path, {"epoch": own})
        found = dict[Path, int]()
        others = [other.selected_path for other in find_parts(run)]
        while len(found) < len(others):
            for path in others:
                with contextlib.suppress(OSError, ValueError):
                    found[path] = int(json.loads(path.read_text())["epoch"])
            stop_if_asked()
            time.sleep(POLL_SECONDS / 4)
        return max(found.values())

    return longest


def _die_with_the_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    say("the process that asked for these seeds has ended")
    os._exit(1)


if __name__ == "__main__":
    with absl_quietened():
        status = main(sys.argv[1:])
    # What holds on to something at the end must not keep the others waiting; all is saved.
    os._exit(status)
