"""Every place to write to is tried before the work begins, and trying it leaves nothing behind."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from pspinal_jax.__main__ import main
from pspinal_jax.errors import PSpinalError, RunError, UsageError
from pspinal_jax.files import check_target
from pspinal_jax.weights.variables import save_variables


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a file, a folder and a pipe in it, to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def contents(place):
    return sorted(str(path) for path in place.rglob("*"))


@pytest.mark.parametrize("name", ["new", "file", "x" * 250, "a\n$\udcff", "folder/new"])
def test_a_file_that_can_be_written_passes(place, name):
    before = contents(place)
    check_target(place / name, "--csv")
    check_target(place / "folder" / name, "work directory", "a", "b/c")
    assert contents(place) == before and (place / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("folder", UsageError, "--csv is .*folder, but .*folder is not a file"),
        ("pipe", UsageError, "pipe is not a file"),
        ("file/new", UsageError, "file is not a folder"),
        ("nowhere/new", UsageError, "nowhere is not a folder"),
        ("x" * 256, PSpinalError, "File name too long"),
        ("/proc/new", RunError, "--csv /proc/new cannot be written"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(place, name, error, said):
    before = contents(place)
    with pytest.raises(error, match=said):
        check_target(place / name, "--csv")
    assert contents(place) == before


@pytest.mark.parametrize("name", ["file", "file/new/deeper", "/proc/new", "x" * 256, "x" * 256 + "/new"])
def test_a_folder_that_cannot_be_made_is_one_line(place, name):
    before = contents(place)
    with pytest.raises(PSpinalError, match="work directory"):
        check_target(place / name, "work directory", "result.json")
    assert contents(place) == before


def test_a_folder_in_the_place_of_a_result_is_noticed(place):
    (place / "folder" / "result.json").mkdir()
    with pytest.raises(UsageError, match=r"result\.json is not a file"):
        check_target(place / "folder", "work directory", "result.json")


@pytest.mark.parametrize(
    "words",
    [
        "predict absent nothing.png --csv folder",
        "evaluate absent --predictions folder",
        "evaluate absent --output file",
        "report absent --output folder",
        "extract-features folder --data.path absent --output folder",
        "compare absent --workdir file",
        "train folder --data.path absent --workdir file",
        "prepare mnist --raw absent --data-dir file",
        "gradients --data.path absent.npz --workdir file",
        "benchmark step --workdir file",
        "benchmark all --workdir file",
    ],
)
def test_every_command_looks_at_its_place_before_anything_else(place, capsys, words):
    """What is worked on does not exist, which would be said otherwise."""
    before = contents(place)
    assert main(words.split()) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words.split()[-1] in said and "absent " not in said
    assert contents(place) == before


def test_a_data_folder_that_is_not_utf_8_is_one_line(place, capsys):
    assert main(["prepare", "digits", "--data-dir", "caf\udce9"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(r"error: caf\udce9 holds bytes that are not UTF-8")


def test_variables_on_a_full_disk_are_an_error_of_the_system_and_leave_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_variables(tmp_path / "v.safetensors", {"params": {"a": np.zeros(9999)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_prepare_on_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    code = (
        "import resource, sys\nfrom pspinal_jax.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        f"sys.exit(main(['prepare', 'digits', '--data-dir', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: digits cannot be prepared" in done.stderr and "File too large" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
