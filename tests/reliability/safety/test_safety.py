"""What safety attacks found: archives that unpack without end, names that steer the terminal, processes that stay."""

import gzip
import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest

from pspinal_jax import __main__ as entry
from pspinal_jax.commands import parse
from pspinal_jax.data import raw
from pspinal_jax.errors import DataError, printable
from pspinal_jax.runs.scores import Scored, score_report

ESCAPES = "\x1b[31mred\x07\r\n\x1b]0;title\x07 \u202egnp.\udcff"


def test_what_is_printed_holds_no_control_characters():
    shown = printable(f"class é 中 {ESCAPES}")
    assert (
        shown.startswith("class é 中 \\x1b[31mred\\x07\\r\\n\\x1b]0;title\\x07 \\u202egnp.\\udcff")
        and shown.isprintable()
    )


def test_names_of_files_and_classes_are_not_printed_raw(tmp_path, capsys, monkeypatch):
    missing = tmp_path / "a\x1b[2Jb\nerror: c"
    assert entry.main(["predict", str(missing), "a.png"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/a\\x1b[2Jb\\nerror: c is not a run directory")
    scored = Scored.of(np.array([0, 1]), np.log([[0.4, 0.6], [0.2, 0.8]]))
    report = score_report(scored, (ESCAPES, "b")) | {"trained_on_it": True, "files": [ESCAPES]}
    monkeypatch.setattr("pspinal_jax.runs.evaluate.evaluate", lambda *_, **__: report)
    assert entry.main(["evaluate", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines()) and said.count("\\x1b[31mred") == 3


@pytest.mark.parametrize("columns", ["1", "3", "5", "1000000000"])
def test_help_ends_however_narrow_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    seen = []
    monkeypatch.setattr(parse.tyro, "cli", lambda *_, **__: (seen.append(os.environ["COLUMNS"]), []))
    monkeypatch.setattr(parse, "quiet_absl", lambda: None)
    parse.parse(object, [], "p", "")
    assert parse.MIN_COLUMNS <= int(seen[0]) <= parse.MAX_COLUMNS


def test_help_on_three_columns():
    env = os.environ | {"COLUMNS": "3"}
    command = [sys.executable, "-m", "pspinal_jax", "evaluate", "--help"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--seed-index" in done.stdout


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_process_ends_whatever_still_waits(status):
    """Threads that never end, and one that holds Python's lock outside Python."""
    code = (
        "import sys, threading, time\n"
        "from pspinal_jax import __main__ as entry\n"
        "entry.SECONDS_TO_END = 1\n"
        f"entry.main = lambda: (threading.Thread(target=lambda: time.sleep(600)).start(), {status})[1]\n"
        "entry.command_line()\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == status and time.monotonic() - start < 30


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(raw, "MAX_BYTES", 5000)


def test_a_zip_member_beyond_the_limit_is_refused_unread(tmp_path, small_limit):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small", b"x" * 5000)
        archive.writestr("large", b"\0" * 5001)
    with raw.open_zip(path) as archive:
        assert len(raw.read_zip_member(archive, path, "small")) == 5000
        with pytest.raises(DataError, match=r"large in .*bomb.zip has 5001 bytes unpacked, expected at most 5000"):
            raw.read_zip_member(archive, path, "large")


@pytest.mark.parametrize("where", ["members", "after them"])
def test_a_tar_beyond_the_limit_is_refused(small_limit, where):
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for index in range(2 if where == "members" else 1):
            info = tarfile.TarInfo(f"{index}.png")
            info.size = 3000
            archive.addfile(info, io.BytesIO(bytes(3000)))
    tail = b"" if where == "members" else bytes(100_000)
    with pytest.raises(DataError, match="bytes unpacked, expected at most 5000"):
        raw.read_tar(io.BytesIO(gzip.compress(plain.getvalue() + tail)), "it", lambda name: True)


def test_an_idx_file_that_unpacks_without_end_is_refused(small_limit):
    header = bytes([0, 0, 8, 3]) + np.array([10**6, 28, 28], ">u4").tobytes()
    with pytest.raises(DataError, match=r"has 5001 bytes unpacked, expected at most 5000"):
        raw.read_idx(gzip.compress(header + bytes(10**6)), "it", np.dtype(np.uint8), (28, 28))
