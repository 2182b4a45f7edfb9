"""A run that meets a signal or a full disk in every part of it says so in one line, and the next start goes on."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import chex
import numpy as np
import pytest

from pspinal_jax.__main__ import main
from pspinal_jax.checkpoints import CheckpointStore
from pspinal_jax.environment import convolution_options
from pspinal_jax.errors import RunError
from pspinal_jax.runs import directory as directory_module
from pspinal_jax.runs import train as train_module
from pspinal_jax.runs.directory import MetricsWriter, RunDirectory
from pspinal_jax.runs.result import load_variables
from pspinal_jax.training.costs import MEASURED
from pspinal_jax.training.examples import EvaluatedSplit
from pspinal_jax.training.loop import Trainer


def command(npz_path, workdir):
    flags = "--data.num-classes 3 --data.num-validation 24 --epochs 3 --batch-size 16 --eval-batch-size 16 --retrain"
    model = "--model.layer-width 64 --model.num-layers 2 --checkpoint-seconds 0"
    return ["train", "digits", *flags.split(), *model.split(), "--data.path", str(npz_path), "--workdir", str(workdir)]


def outcome(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = json.loads((run / "result.json").read_text())["test_accuracy"]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines], accuracy


@pytest.fixture(scope="module")
def undisturbed(npz_path, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(npz_path, run)) == 0
    return run


@pytest.fixture
def run(npz_path, tmp_path, capsys):
    """Runs the command; gives the exit status and what it said on standard error, summary and progress left out."""

    def run_command():
        capsys.readouterr()
        status = main(command(npz_path, tmp_path / "run"))
        said = capsys.readouterr().err.splitlines()
        return status, [line for line in said if line.startswith(("error", "warning", "stopped", "Traceback"))]

    return run_command


def assert_same(run, undisturbed):
    chex.assert_trees_all_equal(load_variables(run)[0], load_variables(undisturbed)[0])
    assert outcome(run) == outcome(undisturbed)


def checkpoints(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


@contextlib.contextmanager
def before(owner, name, act, call=1, undo=lambda: None):
    """In a `with`: call act() before the `call`-th call of `owner.name`, and undo() after it."""
    original, calls = getattr(owner, name), [0]

    def called(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            act()
        try:
            return original(*args, **kwargs)
        finally:
            undo()

    setattr(owner, name, called)
    try:
        yield
    finally:
        setattr(owner, name, original)
    assert calls[0] >= call


@pytest.mark.slow
def test_a_stop_in_any_part_is_saved_and_the_run_goes_on(run, undisturbed, tmp_path):
    moments = [
        (Trainer, "_restore", 0),
        (Trainer, "_warm_up", 0),  # compilation
        (CheckpointStore, "save", None),
        (EvaluatedSplit, "evaluate", None),
        (Trainer, "_next_stage", None),
        (Trainer, "_warm_up", 0),  # of the second stage
    ]
    newest = 0
    for owner, name, steps in moments:
        with before(owner, name, lambda: signal.raise_signal(signal.SIGTERM)):
            status, (said,) = run()
        assert status == 0
        was, newest = newest, checkpoints(tmp_path / "run")[-1]
        assert newest == was if steps == 0 else newest > was
        assert said.startswith("stopped by SIGTERM; the run is saved. Resume with: pspinal-jax train digits --data.num")
        assert not (tmp_path / "run" / "result.json").exists()
    assert run() == (0, [])
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolutions_too_go_on_bit_for_bit(tmp_path, dtype):
    """With oneDNN's, from JAX 0.12 on, each start compiles them anew: such programs are not cached."""
    rng, data = np.random.default_rng(0), tmp_path / "data.npz"
    counts = {"train": 80, "test": 24}
    images = {f"{part}_images": rng.integers(0, 256, (count, 28, 28), np.uint8) for part, count in counts.items()}
    np.savez(data, **images, **{f"{part}_labels": rng.integers(0, 10, count) for part, count in counts.items()})
    flags = f"--data.num-validation 16 --epochs 3 --batch-size 16 --checkpoint-seconds 0 --dtype {dtype}"

    def train(run):
        return main(["train", "kmnist", "--data.path", str(data), "--workdir", str(tmp_path / run), *flags.split()])

    assert train("undisturbed") == 0
    for call in (1, 2):
        with before(CheckpointStore, "save", lambda: signal.raise_signal(signal.SIGTERM), call):
            assert train("run") == 0
        assert not (tmp_path / "run" / "result.json").exists()
    assert train("run") == 0
    assert_same(tmp_path / "run", tmp_path / "undisturbed")
    options = json.loads((tmp_path / "run" / "config.json").read_text())["compiler_options"]
    assert options == convolution_options("cpu")


@pytest.mark.slow
def test_a_stop_while_the_result_is_written_lets_the_run_end(run, undisturbed, tmp_path):
    with before(train_module, "plot_curves", lambda: signal.raise_signal(signal.SIGTERM)):
        assert run() == (0, [])
    assert_same(tmp_path / "run", undisturbed)


@contextlib.contextmanager
def full_disk():
    """In a `with`: no file grows beyond the size that the first function is called with, until the second is called.

    As on a disk that is full: a write ends in the middle, with an error of the operating system.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_room(size=0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    def room():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    try:
        yield no_room, room
    finally:
        room()


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_is_lost(run, undisturbed, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"

    def after_the_first_save():
        while not checkpoints(tmp_path / "run"):  # it is written in the background, where the limit holds too
            time.sleep(0.01)
        return metrics.stat().st_size + 20

    def fail(owner, name, file, call=1, size=lambda: 0):
        with full_disk() as (no_room, room):
            undo = (lambda: None) if file == "checkpoints" else room  # written in the background
            with before(owner, name, lambda: no_room(size()), call, undo):
                status, said = run()
        assert (status, len(said)) == (1, 1), said
        assert said[0].startswith("error: ") and said[0].count(str(tmp_path / "run" / file)) == 1
        assert "cannot be written" in said[0] and os.strerror(27) in said[0]

    fail(directory_module, "write_checked", "config.json")
    assert not (tmp_path / "run" / "config.json").exists()
    # In the middle of a line; then at the next start, before the line that was cut off is taken away.
    fail(MetricsWriter, "append", "metrics.jsonl", call=2, size=after_the_first_save)
    assert not metrics.read_text().endswith("\n")
    fail(MetricsWriter, "rewind", "metrics.jsonl")
    assert metrics.read_text().count("\n") == 1
    there = checkpoints(tmp_path / "run")
    fail(CheckpointStore, "save", "checkpoints", size=lambda: 2000)
    assert there and checkpoints(tmp_path / "run") == there
    # A stop that cannot be saved does not say that it is.
    with before(Trainer, "stop_if_asked", lambda: signal.raise_signal(signal.SIGTERM), 4):
        fail(CheckpointStore, "save", "checkpoints", size=lambda: 2000)
    assert checkpoints(tmp_path / "run") == there
    fail(RunDirectory, "write_result", "result.json")
    there = checkpoints(tmp_path / "run")
    fail(RunDirectory, "write_result", "result.json")
    assert checkpoints(tmp_path / "run") == there and not (tmp_path / "run" / "result.json").exists()
    assert run() == (0, [])
    assert_same(tmp_path / "run", undisturbed)


def test_a_plot_that_fails_is_a_warning_that_names_its_file(run, tmp_path):
    curves = tmp_path / "run" / "curves.png"
    with full_disk() as (no_room, room), before(train_module, "plot_curves", no_room, undo=room):
        status, (said,) = run()
    assert status == 0 and said.startswith(f"warning: {curves} was not drawn: ") and os.strerror(27) in said
    assert (tmp_path / "run" / "result.json").exists() and not curves.exists()
    assert run() == (0, []) and curves.exists()  # it is drawn by the next start


def test_a_work_directory_that_cannot_be_made_is_named(run, tmp_path):
    (tmp_path / "run").write_text("a file")
    status, (said,) = run()
    assert status == 1 and said.startswith("error: ") and str(tmp_path / "run") in said
    assert (tmp_path / "run").read_text() == "a file"


@contextlib.contextmanager
def as_nobody():
    """Permissions do not bind root."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


def test_a_work_directory_without_permission_is_named():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        directory = RunDirectory(Path(folder) / "run")
        refused = pytest.raises(RunError, match=r"run cannot be written: Permission denied")
        with as_nobody(), refused, directory.held({"identity": {}}):
            pass
        os.chmod(folder, 0o755)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_before_there_is_anything_to_save_a_signal_ends_the_command_with_a_line():
    done = run_python(
        "import signal\nfrom pspinal_jax.training.signals import leave_at_once\n"
        "with leave_at_once('nothing is lost. Go on'):\n signal.raise_signal(signal.SIGTERM)\nprint('went on')"
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "stopped by SIGTERM; nothing is lost. Go on\n"


def test_a_second_signal_ends_even_a_call_that_does_not_return():
    """As a compiler's: Python calls no handler during it."""
    done = run_python(
        "import hashlib, os, signal, threading, time\nfrom pspinal_jax.training.signals import StopRequest\n"
        "def send():\n for _ in range(2):\n  time.sleep(0.2); os.kill(os.getpid(), signal.SIGTERM)\n"
        "with StopRequest():\n threading.Thread(target=send).start()\n"
        " hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == ""


def test_ctrl_c_in_any_command_is_no_traceback(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pspinal_jax.__main__._dispatch", interrupted)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
