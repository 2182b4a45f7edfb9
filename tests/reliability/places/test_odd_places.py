"""Odd places to run in: no home, and standard streams that are closed, full, broken or ASCII. None costs a result."""

import io
import pwd
import subprocess
import sys

import pytest

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.progress import Unfailing, progress_bar


class Failing(io.TextIOBase):
    """A stream on a full disk, or a pipe that nobody reads."""

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


FULL, BROKEN = OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")


def command(npz_path, workdir, seeds=1):
    flags = "--epochs 1 --batch-size 16 --eval-batch-size 16 --model.layer-width 6 --data.num-classes 3 --num-seeds"
    place = ["--data.path", str(npz_path), "--workdir", str(workdir), "--data.num-validation", "24"]
    return ["train", "digits", *flags.split(), str(seeds), *place]


@pytest.mark.parametrize("stream", [None, Failing(FULL), Failing(BROKEN)], ids=["closed", "full", "broken"])
def test_a_run_does_not_need_standard_error(npz_path, tmp_path, monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(command(npz_path, tmp_path / "run")) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert (tmp_path / "run" / "result.json").exists() and (tmp_path / "run" / "curves.png").exists()
    assert sys.stderr is stream


@pytest.mark.parametrize("stream", [None, Failing(FULL)], ids=["closed", "full"])
def test_nor_does_the_python_api(npz_path, tmp_path, monkeypatch, stream):
    small = {"epochs": 1, "batch_size": 16, "eval_batch_size": 16, "model__layer_width": 6, "data__num_classes": 3}
    monkeypatch.setattr(sys, "stderr", stream)
    run = pspinal_jax.train("digits", data__path=npz_path, data__num_validation=24, workdir=tmp_path / "run", **small)
    assert 0 <= run.result["test_accuracy"]["mean"] <= 1


@pytest.mark.parametrize("error, said", [(FULL, "error: [Errno 28] No space left on device\n"), (BROKEN, "")])
def test_an_answer_that_cannot_be_printed_is_a_failure_after_the_result(
    npz_path, tmp_path, monkeypatch, capsys, error, said
):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    assert main(command(npz_path, tmp_path / "run")) == 1
    assert (tmp_path / "run" / "result.json").exists()
    assert capsys.readouterr().err.endswith(said)


def test_standard_output_that_is_full_only_when_it_is_flushed_is_a_failure_too(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["recipes"]) == 1
        assert "No space left on device" in capsys.readouterr().err


def test_two_seeds_on_a_terminal_that_knows_ascii_only(npz_path, tmp_path, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert main(command(npz_path, tmp_path / "run-é", seeds=2)) == 0
    text = printed.getvalue().decode("ascii")
    assert r" \xb1 " in text and "(std of 2 seeds)" in text and r"run-\xe9" in text


def run_python(code, redirections=""):
    return subprocess.run(
        ["/bin/bash", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, code],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    """What native code prints would go into it."""
    code = (
        "import os\nfrom pspinal_jax.__main__ import main\nassert main(['--version']) == 0\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\nassert file.fileno() > 2\n"
        "file.write('opened')\nos.write(2, b'x')"
    )
    assert run_python(code, "<&- >&- 2>&-").returncode == 0
    assert (tmp_path / "file").read_text() == "opened"


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "> /dev/null"])
def test_the_exit_status_is_the_commands(redirection):
    code = "import sys\nfrom pspinal_jax.__main__ import main\nsys.exit(main(['nonsense']))"
    assert run_python(code, redirection).returncode == 2


def test_progress_needs_no_stream(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(3, "features", "image", True) as bar:
        bar.update(3)
    assert not Unfailing(None).isatty()


@pytest.fixture
def no_home(monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "XDG_CACHE_HOME", "TFDS_DATA_DIR", "PSPINAL_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)


def test_a_user_without_a_home_trains_and_evaluates(npz_path, tmp_path, no_home, capsys):
    assert main(command(npz_path, tmp_path / "run")) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "args",
    [
        ["evaluate", "~/run"],
        ["predict", "~/run", "image.png"],
        ["export", "~/run"],
        ["train", "~/recipe.py"],
        ["train", "digits", "--workdir", "~/run"],
        ["train", "features", "--data.path", "~/mine.npz"],
        ["train", "folder", "--data.path", "~/images"],
        ["prepare", "digits", "--data-dir", "~/tfds"],
        ["prepare", "mnist"],
    ],
    ids=" ".join,
)
def test_a_path_that_begins_with_no_home_is_one_line(tmp_path, monkeypatch, no_home, capsys, args):
    monkeypatch.chdir(tmp_path)
    assert main(args) in (1, 2)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
