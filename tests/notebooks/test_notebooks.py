"""The notebooks run from their committed source, and were committed executed, small, and free of this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 150_000  # bytes, of a notebook with its outputs
MACHINE_PATHS = re.compile(r"/(home|root|work|Users|tmp|private|var)/|[A-Z]:\\\\")


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def texts(cell):
    """Everything that the cell put out, pictures left out."""
    for output in cell["outputs"]:
        yield "".join(output.get("text", []))
        yield from ("".join(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/"))


def test_notebooks_are_numbered():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5", "6"]


# In a process of its own: what Jupyter warns of is no failure of ours.
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PSPINAL_MNIST"}
    # One thread each for PyTorch, where it is installed: beside other tests, more of them wait for each other.
    environment |= {"TFDS_DATA_DIR": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "execute.py"), str(path), "--to", str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    executed, committed = code_cells(tmp_path / path.name), code_cells(path)
    assert [cell["source"] for cell in executed] == [cell["source"] for cell in committed]
    assert [cell["execution_count"] for cell in executed] == list(range(1, 1 + len(committed)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_committed_executed_small_and_tidy(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, 1 + len(cells))), "run: make notebooks"
    assert all(cell["metadata"] == {} for cell in cells), "run: make notebooks"
    assert any(cell["outputs"] for cell in cells)
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert path.stat().st_size < LARGEST
    assert not [text for cell in cells for text in texts(cell) if MACHINE_PATHS.search(text)]


def test_each_says_how_to_run_it_on_a_hosted_gpu():
    for path in NOTEBOOKS:
        prose = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
        assert sum("[cuda]" in "".join(cell["source"]) for cell in prose) == 1
