"""The Dockerfiles as far as they can be held to without Docker: what they copy is there and is enough for the wheel."""

import fnmatch
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FILES = ("Dockerfile", "Dockerfile.cuda")
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text()


def copied(name):
    """What the file copies from the checkout."""
    text = (REPOSITORY / name).read_text()
    return [source for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for source in line.split()[:-1]]


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_not_ignored(name):
    kept = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"pspinal_jax", "configs", "constraints.txt"} <= set(copied(name)) == kept
    assert all((REPOSITORY / source).exists() for source in copied(name))
    assert not [source for source in copied(name) if fnmatch.fnmatch(source, "*.safetensors")]


def test_the_two_differ_in_the_extra_alone():
    one, other = (
        [line for line in (REPOSITORY / name).read_text().splitlines() if not line.startswith("#")] for name in FILES
    )
    assert [line.replace("cuda,", "") for line in other] == one != other


@pytest.mark.parametrize("name", FILES)
def test_every_version_is_pinned_and_nothing_runs_as_root(name):
    text = (REPOSITORY / name).read_text()
    installs = re.findall(r"pip install [^&]*", text)
    assert len(installs) == 2 and all("constraints.txt" in each for each in installs)
    assert "--no-build-isolation" in text, "or pip would build with the newest hatchling"
    assert {"hatchling", "trove-classifiers"} <= set(re.findall(r"^([\w-]+)==", CONSTRAINTS, re.MULTILINE))
    assert re.search(r"^USER 1000$", text, re.MULTILINE)


@pytest.mark.slow
def test_the_wheel_is_built_from_what_is_copied(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in copied("Dockerfile"):
        (source / name).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", REPOSITORY / name, source / name], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path / "dist", source]
    subprocess.run([str(word) for word in command], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "pspinal_jax/commands/tools.py" in names and "pspinal_jax/configs/digits.py" in names
