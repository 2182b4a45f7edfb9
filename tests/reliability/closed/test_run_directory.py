"""A run is closed and stands alone: its directory and its data are all that it needs, and nothing else gets in."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import pytest

import pspinal_jax
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import held
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.training.loop import Trainer

SMALL = {"epochs": 4, "batch_size": 16, "eval_batch_size": 16, "data__num_validation": 24, "data__num_classes": 3}
SMALL |= {"model__layer_width": 6, "checkpoint_seconds": 0}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def finished(npz_path, tmp_path_factory):
    """A finished run; treat as read-only."""
    run = tmp_path_factory.mktemp("closed") / "run"
    pspinal_jax.train("digits", data__path=npz_path, workdir=run, **SMALL)
    return run


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of it, as a kill at the very end leaves it."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "result.json").unlink()
    return run


def go_on(run, npz_path, **changes):
    return pspinal_jax.train("digits", data__path=npz_path, workdir=run, **(SMALL | changes))


def epochs(run):
    return [
        (line["stage"], line["epoch"]) for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]


@pytest.mark.parametrize("workdir", ["runs/mine", ".", "a/../b", "../link/run"])
def test_a_work_directory_inside_the_data_is_refused_before_anything_is_written(tmp_path, monkeypatch, workdir):
    data = tmp_path / "images"
    (data / "cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(data)
    with pytest.raises(UsageError, match=r"lies inside the data, \.: .* choose another workdir"):
        pspinal_jax.train("folder", data__path=".", workdir=workdir)
    assert [path.name for path in data.iterdir()] == ["cat"]


def test_a_neighbour_of_the_data_is_not_inside_it(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    with pytest.raises(Exception, match=r"class folders|no folders"):
        pspinal_jax.train("folder", data__path=tmp_path / "images", workdir=tmp_path / "images-run")


@pytest.mark.slow
def test_what_a_run_was_started_from_is_read_once(finished, npz_path, tmp_path, monkeypatch):
    """Also where it is needed again: the second training on all data starts from the same parameters."""
    changes = {"init_from": tmp_path / "first", "retrain": True, "seed": 3}
    shutil.copytree(finished, tmp_path / "first")
    whole = go_on(tmp_path / "whole", npz_path, **changes)
    plan, calls = Trainer._plan_epoch, []

    def killed_in_the_third_epoch(self, *args):
        calls.append(None)
        if len(calls) == 3:
            raise Killed
        plan(self, *args)

    monkeypatch.setattr(Trainer, "_plan_epoch", killed_in_the_third_epoch)
    with pytest.raises(Killed):
        go_on(tmp_path / "cut", npz_path, **changes)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "first")
    resumed = go_on(tmp_path / "cut", npz_path, **changes)
    chex.assert_trees_all_equal(resumed.variables, whole.variables)
    (tmp_path / "cut" / "result.json").unlink()
    assert go_on(tmp_path / "cut", npz_path, **changes).result["test_accuracy"] == whole.result["test_accuracy"]


def test_a_damaged_start_is_named(finished, npz_path, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_restore", lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        go_on(tmp_path / "run", npz_path, init_from=finished)
    monkeypatch.undo()
    start = tmp_path / "run" / "start.safetensors"
    start.write_bytes(start.read_bytes()[:-1] + b"\x07")
    with pytest.raises(RunError, match=r"start\.safetensors is damaged"):
        go_on(tmp_path / "run", npz_path, init_from=finished)


def test_a_second_process_is_refused_and_changes_nothing(unfinished, npz_path):
    before = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file() and path.name != ".lock"}
    directory = RunDirectory(unfinished)
    with directory.held(directory.config()):
        with pytest.raises(RunError, match=rf"is in use: process {os.getpid()} on .* trains there"):
            go_on(unfinished, npz_path)
        assert before == {path: path.read_bytes() for path in before}
    go_on(unfinished, npz_path)


def test_a_hold_dies_with_its_process(tmp_path):
    code = "import sys, time\nfrom pathlib import Path\nfrom pspinal_jax.files import held\n"
    code += "with held(Path(sys.argv[1])) as other:\n print(other, flush=True)\n time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "None\n"
        with held(tmp_path / "lock") as other:
            assert other.startswith(f"process {process.pid} on ")
        process.send_signal(signal.SIGKILL)
        process.wait()
    for _ in range(100):  # the kernel lets go a moment later
        with held(tmp_path / "lock") as other:
            if other is None:
                return
        time.sleep(0.05)
    pytest.fail("still held")


def test_a_directory_with_nothing_but_a_lock_is_free(npz_path, tmp_path):
    """As a kill leaves it that comes before config.json is written."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    RunDirectory(tmp_path / "run").check({"identity": {}})


ODD = [b"x**y", b"[1]", b"caf\xe9 \xff", b"gs:", b"a\\b\n{c}?", b"-d $HOME%s"]


def test_folders_of_any_legal_name_hold_a_run_and_its_data(npz_path, tmp_path, finished, capsys):
    """Of which all parts are odd: patterns of globs, escapes, bytes that are no UTF-8."""
    folder = tmp_path.joinpath(*map(os.fsdecode, ODD))
    folder.mkdir(parents=True)
    data = shutil.copy(npz_path, folder / "d[0]*.npz")
    run = go_on(folder / "run", data, tensorboard=True, init_from=finished, epochs=2)
    (folder / "run" / "result.json").unlink()
    assert go_on(folder / "run", data, init_from=finished, epochs=2).result == run.result
    assert run.evaluate()["accuracy"] == run.result["test_accuracy"]["mean"]
    assert (folder / "run" / "confusion.png").exists() and (folder / "run" / "curves.png").exists()
    assert list((folder / "run" / "tensorboard" / "train").glob("events.*"))
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value",
    [
        ("jax_threefry_partitionable", False),
        ("jax_default_prng_impl", "rbg"),
        ("jax_enable_x64", True),
        ("jax_default_matmul_precision", "bfloat16"),
    ],
)
def test_resuming_with_other_settings_of_jax_is_refused(unfinished, npz_path, name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        with pytest.raises(
            UsageError, match=rf"holds another run: jax\.{name[4:]} was {before!r} and is now {value!r}"
        ):
            go_on(unfinished, npz_path)
    finally:
        jax.config.update(name, before)


def test_a_run_of_before_these_settings_were_recorded_goes_on(finished, tmp_path):
    config = RunDirectory(finished).config()
    directory = RunDirectory(tmp_path / "run")
    identity = {key: value for key, value in config["identity"].items() if key != "jax"}
    with directory.held({**config, "identity": identity}):
        directory.check(config)


def remove_second(lines):
    return lines[:1] + lines[2:]


@pytest.mark.parametrize(
    "damage, missing",
    [
        pytest.param(remove_second, [2], marks=pytest.mark.slow),
        (lambda lines: [lines[0], lines[1][: len(lines[1]) // 2], *lines[2:]], [2]),
        (lambda lines: [lines[0], "[" * 100_000, "17", "{}", *lines[3:]], [2, 3]),
        pytest.param(lambda lines: ["\x00"], [1, 2, 3, 4], marks=pytest.mark.slow),
        pytest.param(lambda lines: [], [1, 2, 3, 4], marks=pytest.mark.slow),
        (lambda lines: lines + lines, []),  # as two processes at once left it
    ],
)
def test_damaged_metrics_are_named_and_no_epoch_is_renumbered(finished, unfinished, npz_path, capsys, damage, missing):
    path = unfinished / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in damage(path.read_text().splitlines())))
    for _ in range(2):  # the second time the file is as the first left it
        capsys.readouterr()
        (unfinished / "result.json").unlink(missing_ok=True)
        run = go_on(unfinished, npz_path)
        assert epochs(unfinished) == [("train", epoch) for epoch in (1, 2, 3, 4) if epoch not in missing]
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert len(said) == bool(missing)
        for epoch in missing:
            assert f"train {epoch}" in said[0] and str(path) in said[0]
    assert run.result["test_accuracy"] == json.loads((finished / "result.json").read_text())["test_accuracy"]
