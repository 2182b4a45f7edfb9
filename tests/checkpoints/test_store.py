"""Checkpoints: what is saved comes back, and what is not what was saved is found out."""

import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pspinal_jax import checkpoints as store
from pspinal_jax.checkpoints import CheckpointStore, read_newest
from pspinal_jax.checkpoints.checksum import json_checksum, tree_checksums
from pspinal_jax.errors import RunError


def trees(value=0.0):
    """Two items of several dtypes, and one without a leaf."""
    params = {"head": {"kernel": jnp.arange(6.0).reshape(2, 3) + value, "bias": jnp.ones(3, jnp.bfloat16)}}
    return {"params": params, "best": {"step": jnp.int32(7), "kernel": jnp.full((4,), value)}, "batch_stats": {}}


def abstract(progress):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), trees())


def assert_holds(found, value, progress):
    restored, position = found
    assert position == progress and restored.keys() == trees().keys()
    jax.tree.map(np.testing.assert_array_equal, restored, trees(value))


def steps(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def save(directory, *values):
    """Checkpoints 10, 11, .. of `trees` with these values."""
    with CheckpointStore(directory) as checkpoints:
        for number, value in enumerate(values):
            checkpoints.save(10 + number, trees(value), {"epoch": number})
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "checkpoints", 1.0, 2.0, 3.0)


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_the_two_newest_are_kept_and_the_newest_comes_back(saved):
    assert steps(saved) == [11, 12]
    assert_holds(read_newest(saved, abstract), 3.0, {"epoch": 2})


def test_orbax_v1_reads_what_is_written(saved):
    """The interface that Orbax moves to, which needs nothing of ours."""
    like = {name: tree for name, tree in abstract(None).items() if tree}
    found = ocp.v1.load_checkpointables(saved / "12", like)
    jax.tree.map(np.testing.assert_array_equal, found, {name: trees(3.0)[name] for name in like})
    assert ocp.v1.load_checkpointables(saved / "12", {"record": None})["record"]["position"] == {"epoch": 2}


@pytest.mark.parametrize(("item", "named"), [("params", "params/head/kernel"), ("best", "best/kernel")])
def test_whole_files_with_other_numbers_are_no_checkpoint(copied, item, named, capsys):
    """As a copy of another moment leaves them: everything decodes, and only the checksums of the leaves tell."""
    shutil.rmtree(copied / "12" / item)
    shutil.copytree(copied / "11" / item, copied / "12" / item)
    with pytest.raises(RunError, match=rf"checkpoint 12 in .* is damaged \({named} does not match its checksum\)"):
        read_newest(copied, abstract)
    assert steps(copied) == [11, 12]
    with CheckpointStore(copied) as checkpoints:
        assert_holds(checkpoints.restore(abstract), 2.0, {"epoch": 1})
    assert f"({named} does not match its checksum); using checkpoint 11 instead" in capsys.readouterr().err
    assert steps(copied) == [11], "training goes on from 11, and writes 12 again"


def test_a_leaf_without_a_checksum_is_no_checkpoint(copied):
    def forget(record):
        del record["checksums"]["best"]["step"]

    change_record(copied, forget)
    with pytest.raises(RunError, match="best/step does not match its checksum"):
        read_newest(copied, abstract)


def change_record(directory, change):
    path = directory / "12" / "record" / "metadata"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_progress_that_was_changed_is_no_checkpoint(copied):
    change_record(copied, lambda record: record["position"].update(epoch=1))
    with pytest.raises(RunError, match="its progress does not match its checksum"):
        read_newest(copied, abstract)


def test_where_none_is_whole_each_is_named(copied, capsys):
    for step in ("11", "12"):
        shutil.rmtree(copied / step / "params")
    with CheckpointStore(copied) as checkpoints, pytest.raises(RunError, match="no whole checkpoint is left") as caught:
        checkpoints.restore(abstract)
    assert "checkpoint 12 in" in str(caught.value) and "checkpoint 11 in" in str(caught.value)
    assert steps(copied) == [11, 12]


def test_the_reason_why_a_checkpoint_is_damaged_is_of_readable_length(copied, monkeypatch):
    def fail(*args, **options):
        raise ValueError("broken\n" + "x" * 300)

    monkeypatch.setattr(store, "_read", fail)
    with pytest.raises(RunError) as caught:
        read_newest(copied, abstract)
    assert f"(broken {'x' * 193})" in str(caught.value)


def test_process_0_of_several_looks_for_the_newest_whole_checkpoint(copied, monkeypatch, capsys):
    shutil.rmtree(copied / "12" / "params")
    monkeypatch.setattr(store, "count", lambda: 2)
    monkeypatch.setattr(store, "broadcast_from_primary", lambda find: find())
    with CheckpointStore(copied) as checkpoints:
        assert_holds(checkpoints.restore(abstract), 2.0, {"epoch": 1})
    assert "checkpoint 12 in" in capsys.readouterr().err


def test_reads_that_end_late_are_ignored_from_the_first_restore_on(copied, monkeypatch):
    called = []
    monkeypatch.setattr(store, "_ignore_late_reads", lambda: called.append(True))
    read_newest(copied, abstract)
    assert called


def test_a_reason_that_is_a_run_error_is_given_as_it_is(copied, monkeypatch):
    def fail(*args, **options):
        raise RunError("the disk is gone")

    monkeypatch.setattr(store, "_read", fail)
    with CheckpointStore(copied) as checkpoints, pytest.raises(RunError, match=r"^the disk is gone$"):
        checkpoints.restore(abstract)


def test_a_save_that_fails_when_the_store_is_closed_is_an_error_unless_there_is_one(copied, monkeypatch):
    def close(self):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(store.ocp.CheckpointManager, "close", close)
    with pytest.raises(RunError, match=os.strerror(28)), CheckpointStore(copied):
        pass
    with pytest.raises(ValueError, match="mine"), CheckpointStore(copied):
        raise ValueError("mine")


def test_nothing_is_overwritten_and_what_is_saved_is_not_saved_again(copied):
    with CheckpointStore(copied) as checkpoints:
        checkpoints.restore(abstract)
        checkpoints.save(12, trees(9.0), {"epoch": 2})  # the progress that was restored
        checkpoints.finish()
        assert steps(copied) == [11, 12]
        checkpoints.save(12, trees(4.0), {"epoch": 3})
        checkpoints.finish()
        assert steps(copied) == [12, 13]
        checkpoints.save(20, trees(5.0), progress := {"epoch": 4})
        progress["epoch"] = 5  # the caller's own, which goes on
        checkpoints.save(21, trees(6.0), {"epoch": 5})
    assert steps(copied) == [20, 21]
    assert_holds(read_newest(copied, abstract), 6.0, {"epoch": 5})


def test_saves_wait_for_their_interval_and_take_a_twentieth_of_the_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(store.time, "monotonic", lambda: now[0])
    with CheckpointStore(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.due(60) and checkpoints.empty and checkpoints.restore(abstract) is None
        checkpoints.save(1, trees(), {"epoch": 1})
        assert not checkpoints.empty and not checkpoints.due(60)
        assert not checkpoints.due(10)
        now[0] = 110.0
        assert checkpoints.due(10), "what the first save costs does not count"
        now[0] = 159.0
        assert not checkpoints.due(60)
        now[0] = 160.0
        assert checkpoints.due(60)
        copy = store.copy.deepcopy
        monkeypatch.setattr(store.copy, "deepcopy", lambda value: now.__setitem__(0, 165.0) or copy(value))
        checkpoints.save(2, trees(), {"epoch": 2})  # which took 5 seconds
        now[0] = 165.0 + 99.0
        assert not checkpoints.due(60)
        now[0] = 165.0 + 100.0
        assert checkpoints.due(60) and not checkpoints.due(101)


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(RunError, match="holds no checkpoint"):
        read_newest(tmp_path / "checkpoints", abstract)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunError, match="holds no checkpoint"):
        read_newest(tmp_path / "checkpoints", abstract)


def test_what_cannot_be_read_or_written_is_one_line(copied, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError, match=r"a checkpoint cannot be written to .*file/checkpoints: .*earlier"):
        CheckpointStore(tmp_path / "file" / "checkpoints")
    os.mkfifo(copied / "12" / "pipe")  # which a reader would wait for
    for opening in (lambda: read_newest(copied, abstract), lambda: CheckpointStore(copied)):
        with pytest.raises(RunError, match=r"12/pipe cannot be read: .*; remove it"):
            opening()


def test_what_a_killed_save_left_is_removed(copied):
    left = copied / "13.orbax-checkpoint-tmp-1"
    left.mkdir()
    (left / "part").write_text("cut")
    with CheckpointStore(copied) as checkpoints:
        assert not checkpoints.empty
    deadline = time.monotonic() + 20  # Orbax removes it in the background, and waits for that only at the next save
    while left.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert steps(copied) == [11, 12] and not left.exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing d/1 [os_error_code='28' source='file.cc:1']"), os.strerror(28)),
        (ValueError("of another\nkind " + "x" * 400), "of another kind " + "x" * 284),
    ],
)
def test_the_reason_is_the_operating_systems_where_it_gave_one(error, reason):
    assert store._reason(error) == reason


def test_checksums_tell_values_dtypes_and_shapes_apart():
    kinds = [np.zeros(4, np.float32), np.zeros(4, np.int32), np.zeros((2, 2), np.float32), np.zeros(5, np.float32)]
    kinds += [np.array([0, 0, 0, -0.0], np.float32), np.float32(0), jnp.zeros(4, jnp.bfloat16)]
    sums = [tree_checksums({"a": [kind]}) for kind in kinds]
    assert all(each.keys() == {"a/0"} for each in sums) and len({each["a/0"] for each in sums}) == len(kinds)
    assert tree_checksums({"a": [jnp.zeros(4)]}) == sums[0]
    assert tree_checksums({"a": [np.zeros((4, 2), np.float32)[:, 0]]}) == sums[0], "a view that is not contiguous"
    assert json_checksum({"a": 1, "b": [2]}) == json_checksum({"b": [2], "a": 1}) != json_checksum({"a": 1, "b": [3]})
