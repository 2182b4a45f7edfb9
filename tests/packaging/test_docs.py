"""Every Python block of README.md and docs/ runs, a page's in order; every command line in them is understood."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import pspinal_jax
from pspinal_jax.__main__ import COMMANDS, main
from pspinal_jax.benchmark import run as benchmark_run
from pspinal_jax.commands import parse

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OPTIONAL = {"equinox", "haiku", "ray", "submitit"}
STANDS_FOR = {"RECIPE": "digits", "K": "3"}
"""What a reader puts in their place; other words in capitals are paths."""


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def export_page(place, npz_path):
    """A run and its export, as the page's first commands make them; and images for it."""
    small = {"epochs": 1, "batch_size": 16, "model__layer_width": 6, "data__num_validation": 48, "data__num_classes": 3}
    pspinal_jax.train("digits", data__path=npz_path, workdir=place / "run", **small)
    assert main(["export", str(place / "run"), "--output", str(place / "mnist-export"), "--format", "onnx"]) == 0
    return {"images": np.zeros((5, 4, 4, 1), np.uint8)}


def metrics_page(place, npz_path):
    """A finished run for the page's program to follow."""
    small = {"epochs": 2, "batch_size": 16, "model__layer_width": 6, "data__num_validation": 20, "data__num_classes": 3}
    pspinal_jax.train("digits", data__path=npz_path, workdir=place / "runs" / "digits", **small)
    return {}


def which_head_page(place, npz_path):
    """Features and labels, as few as will do."""
    labels = np.arange(300) % 3
    return {"x": np.eye(3, 5)[labels] + np.random.default_rng(0).normal(0, 0.5, (300, 5)), "y": labels}


BEFORE = {"export.md": export_page, "metrics.md": metrics_page, "which_head.md": which_head_page}
"""What has to be there before a page's first block: it makes that, and gives the names that the page has of it."""

TRAINS = re.compile(r"pspinal_jax\.(train|fit|compare)\(|benchmark\.step\(")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.name,
            marks=[
                *([pytest.mark.slow] if TRAINS.search(page.read_text()) else []),
                # Ray's own about itself; and JAX's, where an earlier page ran it: Ray forks to start its servers.
                *(
                    [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:os.fork:RuntimeWarning")]
                    if page.name == "scaling.md"
                    else []
                ),
            ],
        )
        for page in PAGES
        if blocks(page, "python")
    ],
)
def test_the_blocks_of_a_page_run_in_order(page, npz_path, tmp_path, monkeypatch):
    namespace = BEFORE[page.name](tmp_path, npz_path) if page.name in BEFORE else {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # no token is written into the user's home
    try:
        run(blocks(page, "python"), page, namespace | {"__name__": page.stem})
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


@pytest.mark.slow
def test_the_batch_norm_block_of_the_quickstart_runs_after_the_one_before_it():
    page = REPOSITORY / "docs" / "quickstart.md"
    program, batch_norm = blocks(page, "python")[:2]
    namespace = {"__name__": "quickstart"}
    run([program.replace("range(101)", "range(2)"), batch_norm], page, namespace)
    assert namespace["new"]["batch_stats"].keys() == namespace["variables"]["batch_stats"].keys() != set()


def run(texts, page, namespace):
    missing = set()
    for text in texts:
        try:
            exec(compile(text, page.name, "exec"), namespace)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            missing.add(error.name)
    if missing:
        pytest.skip(f"without {', '.join(missing)}; the other blocks ran")


def test_every_page_stands_in_the_sites_tree():
    tree = (REPOSITORY / "docs" / "index.md").read_text()
    pages = {path.stem for path in (REPOSITORY / "docs").glob("*.*") if path.suffix in (".md", ".rst")} - {"index"}
    assert {page for page in pages if not re.search(rf"(^|<){page}>?$", tree, re.MULTILINE)} == set()


def command_lines(page):
    """The command lines of pspinal-jax in `page`: in its blocks of shell, and in its text."""
    text = page.read_text()
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`([^`]+)`", BLOCK.sub("", text))]:
        words = shlex.split(line, comments=True) if "pspinal-jax " in line else []
        names = [index for index, word in enumerate(words) if word.rpartition("/")[2] == "pspinal-jax"]
        if names and words[names[0] + 1 :]:
            yield [STANDS_FOR.get(word, word) for word in words[names[0] + 1 :]]


LINES = {shlex.join(words): words for page in PAGES for words in command_lines(page)}


class Understood(Exception):
    """A command has parsed its flags and is about to start."""


@pytest.mark.parametrize("words", LINES.values(), ids=LINES)
def test_every_command_line_is_understood(words, tmp_path, monkeypatch):
    def stop(*args, **more):
        raise Understood

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text((REPOSITORY / "configs" / "digits.py").read_text())
    monkeypatch.setattr(parse, "quiet_absl", stop)
    monkeypatch.setattr(benchmark_run, "run_all", stop)
    if len(words) == 1 and words[0] in COMMANDS:
        return  # the command by its name
    try:
        assert main(words) == 0 and words[0] in ("recipes", "doctor", "--version")
    except Understood:
        pass
    except SystemExit as end:
        assert words[-1] in ("--help", "--help-all") and not end.code


def test_there_are_blocks_and_command_lines():
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 12
    assert len(LINES) >= 40
