"""`train --distributed`: two processes on this machine, two simulated devices each."""

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import chex
import numpy as np
import pytest
from processes_support import free_port, metrics, run, run_to_the_end, small, write_four_classes

from pspinal_jax import distributed
from pspinal_jax.__main__ import main
from pspinal_jax.checkpoints import SECONDS_FOR_OTHERS
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.recipes.schema import ProcessOptions
from pspinal_jax.runs.result import load_variables

TWO = "--distributed --num-processes 2"
ENDED_BY_ANOTHER = (1, -6)
"""Our line comes with 1; where process 0 is gone, JAX's coordination client may be faster, and aborts."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_four_classes(tmp_path_factory.mktemp("data") / "four.npz")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Two processes that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run_to_the_end(folder, small(data, folder / "run"))
    return folder / "run"


def losses(workdir):
    return [[line["train_loss"], line["validation_loss"]] for line in metrics(workdir)]


def assert_close(workdir, other):
    """The same run to rounding; `load_variables` reads them on one process with one device."""
    np.testing.assert_allclose(losses(workdir), losses(other), rtol=1e-4)
    chex.assert_trees_all_close(load_variables(workdir)[0], load_variables(other)[0], rtol=0, atol=1e-4)


def assert_same(workdir, other):
    chex.assert_trees_all_equal(load_variables(workdir)[0], load_variables(other)[0])
    assert metrics(workdir) == metrics(other)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(data, tmp_path, capfd):
    flags = ["--epochs", "2"]
    first, second = run_to_the_end(tmp_path, small(data, tmp_path / "two", *flags), found_by="kubeflow")
    assert "test accuracy" in first.out and "results in" in first.out
    assert "train" in first.err and second.err == ""  # one progress bar
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["device"]["count"] == 4 and result["device"]["processes"] == 2
    assert main(small(data, tmp_path / "one", *flags)) == 0
    capfd.readouterr()
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "epochs"),
    [("4 1 1", 50), ("1 4 1", 3), ("1 2 2", 3), ("2 1 2", 3), ("1 1 4", 3), ("2 2 1", 3)],
)
def test_200_steps_on_every_mesh(data, tmp_path, mesh, epochs):
    """Parameters and classes are sharded across processes where that axis is the longer one; 4 steps an epoch."""
    axes = zip(("data", "fsdp", "model"), mesh.split(), strict=True)
    flags = ["--epochs", str(epochs), *(word for axis, size in axes for word in (f"--mesh.{axis}", size))]
    run_to_the_end(tmp_path, small(data, tmp_path / "two", *flags))
    run_to_the_end(tmp_path, small(data, tmp_path / "one", *flags), processes=1, devices=4)
    assert len(metrics(tmp_path / "two")) == epochs
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--mesh.fsdp", "2", "--num-seeds", "2")])
def test_a_run_goes_on_with_another_number_of_processes(data, tmp_path, flags):
    one = {"processes": 1, "devices": 1}
    single = [flag for flag in flags if flag not in ("--mesh.fsdp", "2")] if len(flags) == 2 else list(flags)
    single = ["--mesh.fsdp", "1", *flags[2:]] if flags else single
    run_to_the_end(tmp_path, small(data, tmp_path / "whole", *single), **one)
    for first, second in ((({}, flags), (one, single)), ((one, single), ({}, flags))):
        workdir = tmp_path / f"from_{first[0].get('processes', 2)}"
        last = first[0].get("processes", 2) - 1
        run_to_the_end(tmp_path, small(data, workdir, *first[1]), STOP=f"{last}:6:SIGTERM", **first[0])
        assert not (workdir / "result.json").exists()
        for process in run_to_the_end(tmp_path, small(data, workdir, *second[1]), **second[0]):
            assert process.seen["from"] == 7  # the chunk under way is finished first, one step
        assert len(metrics(workdir)) == 3
        np.testing.assert_allclose(np.ravel(losses(workdir)), np.ravel(losses(tmp_path / "whole")), rtol=1e-4)
        found, expected = (load_variables(path)[0] for path in (workdir, tmp_path / "whole"))
        chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_sigterm_to_one_saves_and_stops_both(data, whole, tmp_path, process):
    arguments = small(data, tmp_path / "run")
    ended = run(tmp_path, [*arguments, "--exit-status-when-stopped", "143"], STOP=f"{process}:6:SIGTERM")
    first, second = ended
    assert first.status == second.status == 143
    assert "stopped by SIGTERM; the run is saved. Resume with: pspinal-jax train digits" in first.err
    assert second.err == "" and first.out == ""
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = run_to_the_end(tmp_path, arguments)
    assert {process.seen["from"] for process in resumed} == {7}
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_sigterm_before_there_is_anything_to_save_ends_both(data, tmp_path, process):
    ended = run(tmp_path, small(data, tmp_path / "run"), STOP=f"{process}:model:SIGTERM", seconds=30)
    assert ended[process].status == 0
    assert "stopped by SIGTERM; nothing is lost. Resume with: pspinal-jax train digits" in ended[process].err
    assert ended[1 - process].status in ENDED_BY_ANOTHER and "Traceback" not in ended[1 - process].err


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_killed_process_ends_the_other_and_both_resume(data, whole, tmp_path, process):
    arguments = small(data, tmp_path / "run")
    ended = run(tmp_path, arguments, STOP=f"{process}:6:SIGKILL", seconds=60)
    killed, other = ended[process], ended[1 - process]
    assert killed.status == -9 and other.status in ENDED_BY_ANOTHER
    assert "Traceback" not in other.err and other.out == ""
    if other.status == 1:
        assert other.err.count(f"error: process {1 - process} of 2 lost contact with another process") == 1
    for resumed in run_to_the_end(tmp_path, arguments):
        assert resumed.seen["from"] > 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_of_four_processes_none_blames_one_that_lives_and_no_log_is_left(data, tmp_path):
    (temporary := tmp_path / "temporary").mkdir()
    arguments = small(data, tmp_path / "run")
    ended = run(tmp_path, arguments, processes=4, devices=1, STOP="2:6:SIGKILL", seconds=60, TMPDIR=str(temporary))
    assert [process.status for process in ended] == [1, 1, -9, 1]
    for index in (0, 1, 3):
        (line,) = [line for line in ended[index].err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: process {index} of 4 lost contact with another process (")
        assert not re.search(r"\b(process|task) [0-9]", line.removeprefix(f"error: process {index} of 4"))
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_reported_once(data, tmp_path):
    ended = run(tmp_path, small(data, tmp_path / "run", "--optimizer.learning-rate", "1e38"))
    assert [process.status for process in ended] == [1, 1]
    assert all(process.err.count("is not finite at step 2 of epoch 1") == 1 for process in ended)
    assert json.loads((tmp_path / "run" / "nonfinite.json").read_text())["step_of_epoch"] == 2


@pytest.mark.slow
def test_only_process_0_prepares(tmp_path):
    """Found through the variables that SLURM sets."""
    arguments = ["train", "digits", "--data.data-dir", str(tmp_path / "data"), "--workdir", str(tmp_path / "run")]
    first, second = run_to_the_end(tmp_path, [*arguments, "--epochs", "1"], found_by="slurm")
    assert first.seen["prepared"] == [False] and second.seen["prepared"] == [True]
    assert "waiting for another process" not in first.err + second.err


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_all(data, tmp_path):
    arguments = small(data, tmp_path / "run")
    run_to_the_end(tmp_path, arguments, STOP="0:9:SIGTERM")
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for file in (newest / "params").rglob("d/*"):
        file.write_bytes(b"")
    first, second = run_to_the_end(tmp_path, arguments)
    assert f"checkpoint {newest.name} in" in first.err and "is damaged" in first.err and second.err == ""
    assert first.seen["from"] == second.seen["from"] < int(newest.name)


@pytest.mark.slow
def test_processes_that_see_different_data_say_so(data, tmp_path):
    """Process 1 finds other files where process 0 has its own."""
    arrays = dict(np.load(data))
    arrays["train_labels"] = arrays["train_labels"][::-1]
    for index in (0, 1):
        (tmp_path / str(index)).mkdir()
        np.savez(tmp_path / str(index) / "four.npz", **(arrays if index else dict(np.load(data))))
    ended = run(tmp_path, small("HERE/four.npz", tmp_path / "run"), HERE=str(tmp_path))
    assert all(process.status == 2 for process in ended)
    assert "process 1 differs from process 0: data_fingerprint is" in ended[1].err
    assert "a process differs" in ended[0].err
    assert all(process.err.count("error:") == 1 and "Traceback" not in process.err for process in ended)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--process-id 1", "--process-id given alone; give --coordinator-address, --num-processes"),
        (
            "--distributed --process-id 1",
            "--process-id given alone; give --coordinator-address, --num-processes",
        ),
        (
            f"{TWO} --coordinator-address 10.0.0.1 --process-id 0",
            "--coordinator-address is '10.0.0.1', expected HOST:PORT",
        ),
        (f"{TWO} --coordinator-address :1234 --process-id 0", "--coordinator-address is ':1234', expected HOST:PORT"),
        (f"{TWO} --coordinator-address a:99999 --process-id 0", "expected HOST:PORT"),
        (f"{TWO} --coordinator-address a:1 --process-id 2", "--process-id is 2, expected 0 .. 1"),
        ("--distributed --heartbeat-timeout 0", "--heartbeat-timeout is 0, expected at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(data, tmp_path, capfd, flags, message):
    assert main(small(data, tmp_path / "run", *flags.split())) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_three_variables_stand_for_the_three_flags(monkeypatch):
    for variable, value in zip(distributed.VARIABLES.values(), ("trainer-0.trainer:29500", "2", "1"), strict=True):
        monkeypatch.setenv(variable, value)
    found = {"coordinator_address": "trainer-0.trainer:29500", "num_processes": 2, "process_id": 1}
    assert distributed._check(ProcessOptions(distributed=True)) == found
    assert distributed._check(ProcessOptions()) == {}, "without the flag a process is alone"
    flags = {"coordinator_address": "a:1", "num_processes": 3, "process_id": 2}
    assert distributed._check(ProcessOptions(distributed=True, **flags)) == flags, "flags go first"
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UsageError, match="the environment's JAX_NUM_PROCESSES is 'two', expected a number"):
        distributed._check(ProcessOptions(distributed=True))
    monkeypatch.delenv("JAX_PROCESS_ID")
    assert distributed._check(ProcessOptions(distributed=True)) == {}, "then JAX looks for a cluster"


@pytest.mark.slow
def test_processes_that_count_differently_say_so(data, tmp_path):
    """Process 1 is started with another --num-processes."""
    arguments = small(data, tmp_path / "run", "--initialization-timeout", "20")
    ended = run(tmp_path, arguments, counts=(2, 3))
    assert all(process.status == 2 for process in ended)
    assert "process 1 differs from process 0: num_processes is 3, on process 0 2" in ended[1].err
    assert all(process.err.count("error:") == 1 and "Traceback" not in process.err for process in ended)


@pytest.mark.slow
def test_without_flags_or_a_cluster_it_says_so(data, tmp_path):
    # In a process of its own, where JAX has not computed anything yet.
    (alone,) = run(tmp_path, small(data, tmp_path / "run", "--distributed"), processes=1)
    assert alone.status == 2
    assert "--distributed found no cluster that JAX knows" in alone.err and alone.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_place_in_a_run_is_held_by_one_process(monkeypatch, tmp_path):
    monkeypatch.setenv("PSPINAL_JAX_CACHE", str(tmp_path))
    given = {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}
    with distributed._place(given):
        line = "is process 1 of a run at coordinator_address 10.0.0.1:1234 already; choose another port"
        with pytest.raises(RunError, match=line), distributed._place(given):
            pass
        with distributed._place(given | {"process_id": 0}), distributed._place({}):
            pass
    with distributed._place(given):
        pass


@pytest.mark.slow
def test_a_second_run_on_the_same_port_leaves_the_first_alone(data, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, folders[0], small(data, folders[0] / "run", "--epochs", "400"), port=port)
        while not (folders[0] / "run" / "metrics.jsonl").exists():
            time.sleep(0.2)
            assert not first.done()
        for process in run(folders[1], small(data, folders[1] / "run"), port=port):
            assert process.status == 1 and process.err.count("\n") == 1
            assert f"of a run at --coordinator-address 127.0.0.1:{port} already" in process.err
        assert not first.done(), "the first must still be training for this to mean anything"
        assert [process.status for process in first.result()] == [0, 0]


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_ends_both_within_a_minute(data, tmp_path):
    arguments = small(data, tmp_path / "run", "--model.layer-width", "256")
    start = time.monotonic()
    first, second = run(tmp_path, arguments, FULL="1:3000", JAX_ENABLE_COMPILATION_CACHE="false")
    assert time.monotonic() - start < 60 + SECONDS_FOR_OTHERS
    assert second.status == 1 and "a checkpoint cannot be written to" in second.err, second.err
    assert first.status in ENDED_BY_ANOTHER and "cannot be written" not in first.err, first.err
    assert "Traceback" not in first.err + second.err


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(data, tmp_path):
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        taken.bind(("::", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = f"{TWO} --coordinator-address {address} --process-id 0".split()
        (alone,) = run(tmp_path, small(data, tmp_path / "run", *flags), processes=1)
    assert alone.status == 1
    port = address.rpartition(":")[2]
    line = f"error: process 0 cannot listen on port {port} for --coordinator-address {address}:"
    assert line in alone.err and "in use" in alone.err and alone.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_is_alone_ends(data, tmp_path, process):
    """JAX 0.12 aborts by itself where nobody comes; our line comes where it raises."""
    address = f"127.0.0.1:{free_port()}"
    flags = f"{TWO} --coordinator-address {address} --process-id {process} --initialization-timeout 2".split()
    (alone,) = run(tmp_path, small(data, tmp_path / "run", *flags), processes=1)
    assert alone.status in ENDED_BY_ANOTHER and "Traceback" not in alone.err
    assert alone.status != 1 or "could not be joined within 2 s" in alone.err
