"""`--seed-mode processes`: what the loop would have given, bit for bit, whatever happens on the way."""

import dataclasses
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import chex
import jax
import pytest
from small_runs import metrics, small_recipe

from pspinal_jax.data import load_data
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.models.build import build_model
from pspinal_jax.recipes import OptimizerConfig, load_recipe
from pspinal_jax.recipes.options import RunOptions
from pspinal_jax.runs import seed_processes
from pspinal_jax.runs.build import set_up
from pspinal_jax.runs.restore import load_variables
from pspinal_jax.runs.seed_rounding import first_steps_checksum
from pspinal_jax.runs.train import train
from pspinal_jax.training import loop as trainer


@pytest.fixture(scope="module")
def recipe(npz_path):
    """Three seeds that select different epochs, and train again for as many as the slowest of them."""
    sgd = OptimizerConfig("sgd", learning_rate=0.1)
    return small_recipe(npz_path, optimizer=sgd, epochs=6, num_seeds=3, retrain=True)


@pytest.fixture(scope="module")
def looped(recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("loop") / "run"
    return path, train(dataclasses.replace(recipe, seed_mode="loop"), RunOptions(workdir=path))


@pytest.fixture(autouse=True)
def two_processes(monkeypatch):
    """Whatever this machine has; their programs are optimised as this process's are."""
    unoptimised = jax.config.values["jax_disable_most_optimizations"]
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(unoptimised)))
    places = seed_processes.cores() or [-1]
    monkeypatch.setattr(seed_processes, "cores", lambda: [places[0], places[-1]])


def in_processes(recipe, path, **changes):
    return train(dataclasses.replace(recipe, seed_mode="processes", **changes), RunOptions(workdir=path))


def assert_same(path, result, looped):
    for index in range(3):
        chex.assert_trees_all_equal(load_variables(path, index)[0], load_variables(looped[0], index)[0])
    assert metrics(path) == metrics(looped[0])
    differ = {name for name in result if result[name] != looped[1][name]}
    assert differ <= {"seconds", "compile_seconds", "seeds_as"}


@pytest.fixture
def started(monkeypatch):
    """The threads that each process was started for, None for as many as there are cores."""
    threads = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, env=None, **options):
            threads.append(env.get("PJRT_NPROC"))
            super().__init__(*args, env=env, **options)

    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setattr(seed_processes.subprocess, "Popen", Popen)
    return threads


def test_they_give_what_the_loop_gives(recipe, looped, tmp_path, started):
    result = in_processes(recipe, tmp_path / "run")
    assert result["seeds_as"] == "2 processes side by side"
    assert started == ["1", "1"]
    assert len(set(result["selected_epoch"])) > 1  # or retraining would be as long everywhere
    assert_same(tmp_path / "run", result, looped)
    assert not (tmp_path / "run" / "seeds").exists()


@pytest.mark.slow
def test_where_one_thread_rounds_otherwise_there_are_as_many_as_in_the_loop(
    recipe, looped, tmp_path, monkeypatch, started
):
    monkeypatch.setattr(seed_processes, "first_steps_checksum", lambda setup: "00000000")
    assert_same(tmp_path / "run", in_processes(recipe, tmp_path / "run"), looped)
    assert started == ["1", "1", None, None]


def test_the_first_steps_tell_programs_apart(recipe, npz_path):
    def checksum(**changes):
        changed = dataclasses.replace(recipe, num_seeds=1, **changes)
        data = load_data(changed.data)
        return first_steps_checksum(set_up(changed, build_model(changed, data.example_shape, data.num_classes), data))

    alike = checksum()
    assert checksum() == alike
    changes = ({"batch_size": 15}, {"eval_batch_size": 8}, {"label_smoothing": 0.3})
    assert len({alike, *(checksum(**change) for change in changes)}) == 4


def command(path, out):
    """Train `path`'s recipe in a process of its own, which writes its result to `out`."""
    program = (
        "import json, pickle, sys; from pathlib import Path; from pspinal_jax.runs import seed_processes\n"
        "from pspinal_jax.recipes.options import RunOptions; from pspinal_jax.runs.train import train\n"
        "seed_processes.cores = lambda: [0, 0] if hasattr(__import__('os'), 'sched_setaffinity') else []\n"
        "recipe = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "result = train(recipe, RunOptions(workdir=Path(sys.argv[2]), checkpoint_seconds=0.0))\n"
        "Path(sys.argv[3]).write_text(json.dumps(result))"
    )
    return [sys.executable, "-c", program, str(path.with_name("recipe")), str(path), str(out)]


def stop_when(condition, number, process):
    """Send the signal when `condition()` holds, or leave the process alone if it ends before."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        os.kill(process.pid, number)
    process.wait(90)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_run_that_is_stopped_goes_on_to_the_same_end(recipe, looped, tmp_path, number):
    path = tmp_path / "run"
    path.with_name("recipe").write_bytes(pickle.dumps(dataclasses.replace(recipe, seed_mode="processes")))
    process = subprocess.Popen(command(path, tmp_path / "out"), stderr=subprocess.DEVNULL)
    stop_when(lambda: (path / "seeds/0-0/metrics.jsonl").exists(), number, process)
    assert process.returncode == (-number if number == signal.SIGKILL else 1)  # a Stopped that nobody catches
    assert (path / "seeds").is_dir() and not (path / "result.json").exists()
    assert_same(path, in_processes(recipe, path), looped)


@pytest.mark.slow
def test_ten_kills_at_any_moment_change_nothing(recipe, looped, tmp_path):
    recipe_path, rng, kills, runs = tmp_path / "recipe", random.Random(0), 0, 0
    recipe_path.write_bytes(pickle.dumps(dataclasses.replace(recipe, seed_mode="processes")))
    while kills < 10:
        path, runs = tmp_path / f"run_{runs}", runs + 1
        while kills < 10 and not (path / "result.json").exists():
            process = subprocess.Popen(command(path, tmp_path / "out"), stderr=subprocess.DEVNULL)
            until = time.monotonic() + rng.uniform(1.0, 9.0)
            stop_when(lambda until=until: time.monotonic() > until, signal.SIGKILL, process)
            kills += process.returncode == -signal.SIGKILL
        assert_same(path, in_processes(recipe, path), looped)


def test_what_a_process_ends_with_is_the_runs_error(recipe, tmp_path):
    with pytest.raises(RunError, match=r"a gradient of seed \d is not finite at step \d+ of epoch 1"):
        in_processes(recipe, tmp_path / "run", optimizer=OptimizerConfig("sgd", learning_rate=1e30))


def test_where_they_cannot_be_they_are_refused(recipe, tmp_path):
    with pytest.raises(
        UsageError, match=r"seed_mode is processes, expected auto, loop or vmap: .* without --init-from"
    ):
        train(
            dataclasses.replace(recipe, seed_mode="processes"),
            RunOptions(workdir=tmp_path / "run", init_from=tmp_path / "other"),
        )
    with pytest.raises(UsageError, match="seed_mode is processes, expected loop or auto for image files"):
        dataclasses.replace(load_recipe("folder"), num_seeds=2, seed_mode="processes")


def test_auto_takes_them_for_long_trainings_only(recipe, looped, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pspinal_jax.runs.train.train_in_processes", lambda *args: asked.append(args) or pytest.skip("asked for")
    )
    monkeypatch.setattr(trainer, "CHUNK_SECONDS", 2.0)
    train(dataclasses.replace(recipe, epochs=1), RunOptions(workdir=tmp_path / "short"))
    assert not asked
    monkeypatch.setattr(seed_processes, "_LEAST_EXAMPLES", 1000)
    with pytest.raises(pytest.skip.Exception, match="asked for"):
        train(recipe, RunOptions(workdir=tmp_path / "long"))
