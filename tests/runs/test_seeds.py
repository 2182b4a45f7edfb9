"""`--seed-mode processes`: seeds learn as in the loop, and a run that is stopped ends where it would have ended."""

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
import numpy as np
import pytest
from small_runs import metrics, small_recipe

from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.recipes import OptimizerConfig, load_recipe
from pspinal_jax.recipes.schema import RunOptions
from pspinal_jax.runs import seeds
from pspinal_jax.runs.result import load_variables
from pspinal_jax.runs.train import train


@pytest.fixture(scope="module")
def recipe(npz_path):
    """Three seeds that select different epochs, and train again for as many as the slowest of a process."""
    sgd = OptimizerConfig("sgd", learning_rate=0.1)
    return small_recipe(npz_path, optimizer=sgd, epochs=6, num_seeds=3, retrain=True, seed_mode="processes")


@pytest.fixture(scope="module", autouse=True)
def two_processes():
    """Whatever this machine has; their programs are optimised as this process's are."""
    with pytest.MonkeyPatch.context() as patch:
        unoptimised = jax.config.values["jax_disable_most_optimizations"]
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(unoptimised)))
        patch.setattr(seeds, "cores", lambda: 2)
        yield


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("processes") / "run"
    return path, train(recipe, RunOptions(workdir=path))


def assert_same(path, result, finished):
    for index in range(3):
        chex.assert_trees_all_equal(load_variables(path, index)[0], load_variables(finished[0], index)[0])
    assert metrics(path) == metrics(finished[0])
    assert {name for name in result if result[name] != finished[1][name]} <= {"seconds", "compile_seconds", "costs"}


def test_a_trace_of_seeds_in_processes_is_refused(recipe, tmp_path):
    with pytest.raises(UsageError, match="profile and dump_hlo look into this process"):
        train(recipe, RunOptions(workdir=tmp_path / "run", dump_hlo=tmp_path / "hlo"))


@pytest.mark.slow
def test_seeds_in_processes_learn_as_in_the_loop(recipe, finished, tmp_path):
    path, result = finished
    assert result["seeds_as"] == "2 processes side by side" and not (path / "seeds").exists()
    looped = train(dataclasses.replace(recipe, seed_mode="loop"), RunOptions(workdir=tmp_path / "run"))
    assert result["selected_epoch"] == looped["selected_epoch"] and len(set(result["selected_epoch"])) > 1
    for index in range(3):
        chex.assert_trees_all_close(
            load_variables(path, index)[0], load_variables(tmp_path / "run", index)[0], rtol=1e-4, atol=1e-5
        )
    lines, expected = metrics(path), metrics(tmp_path / "run")
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):  # None once the seeds of a process have been trained again
        pairs = zip(np.ravel(line["train_loss"]), np.ravel(other["train_loss"]), strict=True)
        assert all(loss is None or np.isclose(loss, like) for loss, like in pairs)
    assert train(recipe, RunOptions(workdir=path)) == result


def test_lines_of_processes_join_where_only_some_have_left_out_steps():
    line = {"stage": "train", "epoch": 1, "step": 2, "seconds": 0.5, "examples_per_second": 2.0}
    for skipped, joined in ((({}, {"skipped_steps": [0, 3]}), [0, 0, 3]), (({"skipped_steps": 2}, {}), [2, 0, 0])):
        assert seeds.join_lines([line | each for each in skipped], [1, 2])["skipped_steps"] == joined
    assert seeds.join_lines([line, line | {"seconds": 0.7}], [1, 2]) == line | {
        "seconds": 0.7,
        "examples_per_second": 4.0,
    }


def command(path, out):
    """Train `path`'s recipe in a process of its own, which writes its result to `out`."""
    program = (
        "import json, pickle, sys; from pathlib import Path; from pspinal_jax.runs import seeds\n"
        "from pspinal_jax.recipes.schema import RunOptions; from pspinal_jax.runs.train import train\n"
        "seeds.cores = lambda: 2\n"
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_seeds_in_processes_that_are_stopped_go_on_to_the_same_end(recipe, finished, tmp_path, number):
    path = tmp_path / "run"
    path.with_name("recipe").write_bytes(pickle.dumps(recipe))
    process = subprocess.Popen(command(path, tmp_path / "out"), stderr=subprocess.DEVNULL)
    stop_when(lambda: (path / "seeds/0-0/metrics.jsonl").exists(), number, process)
    assert process.returncode == (-number if number == signal.SIGKILL else 1)  # a Stopped that nobody catches
    assert (path / "seeds").is_dir() and not (path / "result.json").exists()
    assert_same(path, train(recipe, RunOptions(workdir=path)), finished)


@pytest.mark.slow
def test_ten_kills_at_any_moment_change_nothing(recipe, finished, tmp_path):
    recipe_path, rng, kills, runs = tmp_path / "recipe", random.Random(0), 0, 0
    recipe_path.write_bytes(pickle.dumps(recipe))
    while kills < 10:
        path, runs = tmp_path / f"run_{runs}", runs + 1
        while kills < 10 and not (path / "result.json").exists():
            process = subprocess.Popen(command(path, tmp_path / "out"), stderr=subprocess.DEVNULL)
            until = time.monotonic() + rng.uniform(1.0, 9.0)
            stop_when(lambda until=until: time.monotonic() > until, signal.SIGKILL, process)
            kills += process.returncode == -signal.SIGKILL
        assert_same(path, train(recipe, RunOptions(workdir=path)), finished)


@pytest.mark.slow
def test_the_reason_for_which_a_process_failed_is_the_runs_error(recipe, tmp_path):
    changed = dataclasses.replace(recipe, optimizer=OptimizerConfig("sgd", learning_rate=1e30))
    with pytest.raises(RunError, match=r"a gradient of seed \d is not finite at step \d+ of epoch 1"):
        train(changed, RunOptions(workdir=tmp_path / "run"))


def test_seeds_in_processes_are_refused_where_they_cannot_be(recipe, tmp_path):
    with pytest.raises(UsageError, match=r"seed_mode is processes, expected auto, loop or vmap"):
        train(recipe, RunOptions(workdir=tmp_path / "run", init_from=tmp_path / "other"))
    with pytest.raises(UsageError, match="seed_mode is processes, expected loop or auto for image files"):
        dataclasses.replace(load_recipe("folder"), num_seeds=2, seed_mode="processes")


def test_seed_mode_auto_takes_processes_for_long_trainings_only(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("pspinal_jax.runs.train.train_in_processes", lambda *args: pytest.skip("asked for"))
    auto = dataclasses.replace(recipe, seed_mode="auto")
    train(dataclasses.replace(auto, epochs=1), RunOptions(workdir=tmp_path / "short"))
    monkeypatch.setattr(seeds, "_MIN_EXAMPLES", 1000)
    with pytest.raises(pytest.skip.Exception, match="asked for"):
        train(auto, RunOptions(workdir=tmp_path / "long"))
