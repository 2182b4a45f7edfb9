"""`pspinal_jax.ray.train` with the real Ray: two workers on CPU, killed and started again by Ray."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import chex
import pytest
from processes_support import metrics, write_four_classes

import pspinal_jax.ray
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.runs.result import load_variables

# No token is written into the user's home, and workers wait for no other process of the machine.
SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


@pytest.mark.slow
def test_a_run_on_ray_that_lost_each_worker_is_the_one_that_lost_none(tmp_path):
    pytest.importorskip("ray")
    data = write_four_classes(tmp_path / "four.npz")
    command = [sys.executable, str(Path(__file__).with_name("ray_driver.py")), str(data), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert len(set(seen["killed"])) == 2
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    chex.assert_trees_all_equal(load_variables(killed)[0], load_variables(whole)[0])
    assert metrics(killed) == metrics(whole) and len(metrics(whole)) == 8
    # It went on from a checkpoint: the first epoch's seconds are those of before the last kill.
    assert (killed / "metrics.jsonl").read_text().splitlines()[0] == seen["lines"][0]


def test_ray_that_is_not_installed_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"Ray is not installed; in the checkout: pip install '.\[ray\]'"):
        pspinal_jax.ray.train("digits", None)


def test_a_cluster_that_is_not_there_is_named_without_waiting(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: False))
    unreachable = pytest.raises(RunError, match=r"the Ray cluster 127.0.0.1:1 cannot be reached: .*refused")
    with unreachable, pspinal_jax.ray.cluster("127.0.0.1:1"):
        pass


def test_signals_keep_their_handlers_beside_a_cluster(monkeypatch):
    def init(*args, **options):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    ray = types.SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pspinal_jax.ray.cluster():
            assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, before)
