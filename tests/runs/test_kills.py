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


EPOCHS = 1000


def train(workdir, data) -> subprocess.Popen:
    flags = f"--data.path {data} --workdir {workdir} --epochs {EPOCHS} --checkpoint-seconds 0 --data.num-validation 200"
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


def finish(process):
    _, error = process.communicate()
    assert process.returncode == 0, error


def epochs_of(run):
    lines = run / "metrics.jsonl"
    return len(lines.read_text().splitlines()) if lines.exists() else 0


def test_ten_kills_leave_no_trace(data, tmp_path):
    start = time.monotonic()
    undisturbed = train(tmp_path / "whole", data)
    while not epochs_of(tmp_path / "whole"):
        assert undisturbed.poll() is None
        time.sleep(0.05)
    start_up = time.monotonic() - start
    finish(undisturbed)
    training = time.monotonic() - start - start_up
    rng, moments = random.Random(0), []
    for _ in range(KILLS):
        process = train(tmp_path / "killed", data)
        # Anywhere in imports, compilation, or the first eighth of the training: so ten times in a run.
        moment = rng.uniform(0.1, start_up + training / 8)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        moments.append((round(moment, 2), epochs_of(tmp_path / "killed")))
    finish(train(tmp_path / "killed", data))
    print("seconds until the kill, epochs by then:", moments)
    assert max(epochs for _, epochs in moments) > 0
    whole, killed = (load_variables(tmp_path / name)[0] for name in ("whole", "killed"))
    chex.assert_trees_all_equal(whole, killed)
    assert epochs_of(tmp_path / "killed") == EPOCHS


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
