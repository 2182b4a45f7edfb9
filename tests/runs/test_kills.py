"""kill -9 at random moments: the resumed run must end where the undisturbed one ends, bit for bit."""

import random
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from pspinal_jax.runs.restore import load_variables

pytestmark = pytest.mark.slow

KILLS = 10


def train(workdir, data) -> subprocess.Popen:
    flags = f"--data.path {data} --workdir {workdir} --epochs 400 --checkpoint-seconds 0 --data.num-validation 200"
    command = [sys.executable, "-m", "pspinal_jax", "train", "digits", *flags.split()]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 1400), ("test", 300)):
        arrays[f"{part}_labels"] = rng.integers(0, 10, count)
        images = rng.integers(0, 150, (count, 8, 8))
        images[np.arange(count), arrays[f"{part}_labels"] % 8] += 60
        arrays[f"{part}_images"] = images.astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **arrays)
    return path


def test_ten_kills_leave_no_trace(data, tmp_path):
    start = time.monotonic()
    undisturbed = train(tmp_path / "whole", data)
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    length = time.monotonic() - start
    rng, moments = random.Random(0), []
    for kill in range(KILLS):
        process = train(tmp_path / "killed", data)
        # Later kills come later, so that the run gets on; the first ones hit imports and compilation.
        moment = rng.uniform(0.2, 1.0) * length * (kill + 1) / KILLS
        try:
            process.wait(timeout=moment)
            moments.append((round(moment, 2), "finished before"))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        lines = tmp_path / "killed" / "metrics.jsonl"
        moments.append((round(moment, 2), len(lines.read_text().splitlines()) if lines.exists() else 0))
    last = train(tmp_path / "killed", data)
    assert last.wait() == 0, last.stderr.read()
    print("seconds until the kill, epochs by then:", moments)
    assert len(moments) == KILLS and max(epochs for _, epochs in moments) > 0
    whole, killed = (load_variables(tmp_path / name)[0] for name in ("whole", "killed"))
    chex.assert_trees_all_equal(whole, killed)
    epochs = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert len(epochs) == 400


def test_sigterm_saves_says_how_to_resume_and_exits_with_0(data, tmp_path):
    process = train(tmp_path / "run", data)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped by SIGTERM; the run is saved. Go on with: pspinal-jax train digits" in error
    assert "Traceback" not in error
