"""`benchmark all`: what it refuses, its report from given figures, and (slow) whole rehearsals and a kill."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspinal_jax.__main__ import main
from pspinal_jax.benchmark import SECTIONS
from pspinal_jax.benchmark.head import SHAPES, HeadGradient
from pspinal_jax.benchmark.report import write_suite_report
from pspinal_jax.benchmark.timing import table

ROWS = [
    ["ours", 2.0, "1 .. 3", "50 %", 1.5, 32_000, "(ours)"],
    ["theirs", 8.0, "", None, 1.5, 8_000, "4.00 x (3.00 .. 5.00)"],
]
CELLS = [dict(zip("abcdefg", row, strict=True)) for row in ROWS]
MEASUREMENT = table("a step, tf32", CELLS, {"ms": {"ours": [1.0, 2.0, 3.0], "theirs": [8.0]}})
RECORD = {
    "section": "step",
    "status": "done",
    "device": {"kind": "a GPU"},
    "versions": {"jax": "1.2"},
    "left_out": ["ours: no memory"],
    "further": ["float32", "bfloat16"],
    "seconds": 12.0,
    "entries": [MEASUREMENT],
}


def write_report(tmp_path, **changes):
    (tmp_path / "step.json").write_text(json.dumps(RECORD | changes))
    write_suite_report(tmp_path, {"command": "the command", "date": "today"})
    return (tmp_path / "report.md").read_text()


def test_the_report_names_machine_figures_and_what_was_left_out(tmp_path):
    report = write_report(tmp_path)
    for said in (
        "`the command`",
        "a GPU",
        "jax 1.2",
        "4.00 x (3.00 .. 5.00)",
        "32,000",
        "- step: float32: no time left",
        "- step: bfloat16: no time left",
        "- step: ours: no memory",
    ):
        assert said in report
    assert report.index("## Left out") > report.index("32,000")
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert (tmp_path / "report.csv").read_text().splitlines()[1].startswith('step,"a step, tf32",ours,2.0,')


def test_the_report_begins_with_what_is_missing_everywhere(tmp_path):
    (tmp_path / "step.json").write_text(json.dumps(RECORD))
    write_suite_report(tmp_path, {"command": "the command", "date": "today", "left_out": ["PyTorch: not there"]})
    assert (tmp_path / "report.md").read_text().splitlines()[2] == "**Left out: PyTorch: not there.**"


def test_a_section_that_failed_is_in_the_report(tmp_path):
    report = write_report(tmp_path, status="failed with exit status 1, see step.log", entries=[])
    assert "failed with exit status 1, see step.log" in report


class Hanging:
    """A section's process that never ends; nobody waits for it here."""

    exitcode = None

    def __init__(self, **arguments):
        pass

    def join(self, seconds=None):
        pass

    start = kill = join


def test_where_no_time_is_left_a_section_is_not_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pspinal_jax.benchmark.run._GRACE_SECONDS", 0.0)
    words = ["benchmark", "all", "--workdir", str(tmp_path), "--minutes", "0.2", "--sections", "depth", "epoch"]
    assert main(words) == 0
    for name in ("depth", "epoch"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["status"] == "no time left"
        assert not (tmp_path / f"{name}.log").exists()
    assert "no time left" in (tmp_path / "report.md").read_text()


def test_every_section_has_its_comparison_before_any_has_more(tmp_path, monkeypatch):
    begun = []

    def run_section(arguments, latest):
        name, _, path, _, _, _, further = arguments
        begun.append((name, further))
        left = [] if further or name == "epoch" else ["more"]
        path.write_text(
            json.dumps(
                RECORD
                | {"section": name, "left_out": [], "further": left}
                | {"comparison_seconds": 1000.0 if name == "seeds" else 1.0}
            )
        )
        return "done"

    monkeypatch.setattr("pspinal_jax.benchmark.run._run_section", run_section)
    words = ["benchmark", "all", "--workdir", str(tmp_path), "--sections", "depth", "epoch", "step", "seeds"]
    assert main(words) == 0
    names = ["seeds", "depth", "step", "epoch"]  # the shortest first
    assert begun == [*((name, False) for name in names), ("step", True), ("depth", True)]
    assert "- seeds: more: no time left" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("grace", "status"), [(20.0, 0), (900.0, 1)])
def test_a_section_that_is_stopped_failed_unless_all_time_was_over(tmp_path, monkeypatch, grace, status):
    monkeypatch.setattr("pspinal_jax.benchmark.run._GRACE_SECONDS", grace)
    monkeypatch.setattr("pspinal_jax.benchmark.run._CONTEXT.Process", Hanging)
    words = ["benchmark", "all", "--workdir", str(tmp_path), "--minutes", "0.01", "--sections", "depth"]
    assert main(words) == status
    said = json.loads((tmp_path / "depth.json").read_text())["status"]
    assert "stopped after" in said and said.startswith("no time left") == (status == 0)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--sections", "stepp"], "unknown section 'stepp' of benchmark all; there are: machine, step"),
        (["--minutes", "0"], "--minutes is 0, expected a positive number"),
        (["--minutes", "x"], "invalid float value: 'x'"),
        (["--precisions", "int4"], "invalid choice: 'int4'"),
        ([], "holds a report already"),
    ],
)
def test_benchmark_all_refuses_in_one_line(tmp_path, capsys, flags, line):
    (tmp_path / "report.md").write_text("earlier results")
    assert main(["benchmark", "all", "--workdir", str(tmp_path), *flags]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert len(said.splitlines()) == 1
    assert (tmp_path / "report.md").read_text() == "earlier results"


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_head_is_lowered_for_accelerators(platform, dtype):
    case = HeadGradient(SHAPES[1], dtype)
    arguments = (case.params, jnp.asarray(case.features), jax.random.key(0))
    for implementation in ("fused", "unrolled"):
        from pspinal_jax.heads.layouts import NATIVE_LAYOUT, convert_params

        params = convert_params(case.params, NATIVE_LAYOUT[implementation])
        gradient = jax.jit(case.gradient(implementation, 0.2))
        exported = jax.export.export(gradient, platforms=[platform])(params, *arguments[1:])
        assert exported.platforms == (platform,)


@pytest.mark.slow
def test_benchmark_all_tiny_fails_nowhere(tmp_path):
    flags = ["--tiny", "--minutes", "15", "--precisions", "tf32", "--workdir", str(tmp_path / "all")]
    done = subprocess.run(
        [sys.executable, "-m", "pspinal_jax", "benchmark", "all", *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in SECTIONS:
        record = json.loads((tmp_path / "all" / f"{name}.json").read_text())
        assert record["status"] == "done", name
        assert record["entries"], name
        assert importlib.util.find_spec("torch") is None or "PyTorch" in json.dumps(record["entries"]), name
        wrong = [reason for reason in record["left_out"] if "no time left" not in reason and "torch" not in reason]
        assert not wrong, name
    assert "| alternative |" in (tmp_path / "all" / "report.md").read_text()


def writers(folder):
    """Open files in `folder`, of all processes that the system lets us look into."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found += [link] if os.readlink(link).startswith(str(folder)) else []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_benchmark_all_keeps_what_was_measured_when_killed(tmp_path, number):
    flags = ["--tiny", "--minutes", "5", "--sections", "epoch", "step", "--workdir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pspinal_jax", "benchmark", "all", *flags], env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    end = time.monotonic() + 240
    while not (tmp_path / "report.md").exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) != 0
    report = (tmp_path / "report.md").read_text()
    assert "## A training step of the MNIST row" in report
    assert np.isfinite(json.loads((tmp_path / "step.json").read_text())["seconds"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not tell who has a file open")
def test_benchmark_section_ends_with_its_parent(tmp_path):
    flags = ["--minutes", "5", "--sections", "epoch", "--workdir", str(tmp_path)]  # a minute, were it left alone
    process = subprocess.Popen([sys.executable, "-m", "pspinal_jax", "benchmark", "all", *flags])
    end = time.monotonic() + 60
    while not writers(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    process.kill()
    process.wait(60)
    end = time.monotonic() + 5
    while writers(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    assert not writers(tmp_path)
