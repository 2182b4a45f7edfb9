"""`compare --engine ray` with the real Ray: the comparison of the thread pool, also where a worker is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from comparison_support import SMALL, small_data
from kill_comparison import finish, result_of, start, write_data

from pspinal_jax.__main__ import main
from pspinal_jax.comparison import train
from pspinal_jax.comparison.search import Comparer
from pspinal_jax.comparison.settings import CompareConfig
from pspinal_jax.comparison.trial_log import Key, TrialLog

FEWER = ["--heads", "progressive", "dense", "--trials", "4", "--num-seeds", "2", "--no-floors"]
CLUSTER = """
import ray
print(ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)["gcs_address"], flush=True)
input()
"""


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """The address of a Ray cluster of two cores, whose processes have MARK in their environment."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # no token is written into the user's home
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    environment = os.environ | {"MARK": str(tmp_path), "RAY_worker_niceness": "0"}
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, stderr=-3, text=True) as process:
        yield process.stdout.readline().strip()
        process.communicate("\n", timeout=60)


def working(folder):
    """The processes of the cluster that have a training under way."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
            if b"ray::_run_task" in words and f"MARK={folder}".encode() in environment:
                yield int(path.name)
        except OSError:
            pass  # it has ended


@pytest.mark.slow
def test_compare_on_ray_that_lost_a_worker_is_the_comparison_of_threads(tmp_path, cluster):
    write_data(tmp_path)
    finish(start(tmp_path, "alone", more=FEWER))
    process = start(tmp_path, "ray", more=[*FEWER, "--engine", "ray", "--ray-address", cluster])
    trials, killed = tmp_path / "ray" / "trials.jsonl", []
    while process.poll() is None and not killed:
        if trials.exists() and b'"trial"' in trials.read_bytes():
            for worker in list(working(tmp_path))[:1]:
                os.kill(worker, signal.SIGKILL)
                killed.append(worker)
        time.sleep(0.01)
    finish(process)
    assert len(killed) == 1
    assert result_of(tmp_path, "ray") == result_of(tmp_path, "alone")
    lines = [
        sorted(map(unmeasured, (tmp_path / name / "trials.jsonl").read_text().splitlines()))
        for name in ("ray", "alone")
    ]
    assert lines[0] == lines[1]
    execution = json.loads((tmp_path / "ray" / "compare.json").read_text())["execution"]
    assert execution["engine"] == "ray" and execution["workers"] is None


def unmeasured(line):
    record = json.loads(line)
    return json.dumps({name: value for name, value in record.items() if name not in ("seconds", "checksum")})


def test_a_training_on_a_worker_is_the_one_here():
    comparer = Comparer(small_data(), CompareConfig(**SMALL), TrialLog(None), shown=False)
    task, examples = comparer._task(Key("trial", 0, "dense", 0), comparer._part), comparer._examples("trial", 0)
    ((_, expected, _),) = comparer.trainers["trial"].run([task], examples)
    trainer = tuple(comparer.heads.items()), comparer.schedule
    for compiled in (1, 0):
        found, _, programs = train._train_there(examples, trainer, task, False)
        np.testing.assert_array_equal(found.logits, expected.logits)
        assert programs == compiled


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--engine ray --mode vmap", "error: mode is vmap, but engine ray gives each training a core"),
        ("--ray-address auto", "error: --ray-address is auto, but engine is threads; give engine ray"),
        ("--engine ray", "error: Ray is not installed; in the checkout: pip install '.[ray]'"),
    ],
)
def test_compare_refuses_an_engine_in_one_line(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    assert main(["compare", "data.npz", "--no-floors", *words.split()]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1, said
    assert not (tmp_path / "runs").exists()
