"""Execute the notebooks and save them with their outputs, without what differs from machine to machine.

python notebooks/execute.py [NOTEBOOK ..] [--to FOLDER]: in place, or into FOLDER; all of them where none is named. Each
runs in an empty folder of its own, with the kernel of this Python. (`make notebooks` does this.)
"""

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook at `path`, executed. Raises nbclient's CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, kernel_name="python3", timeout=600, record_timing=False, resources=resources).execute()
    return notebook


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """`notebook` without progress bars and notices on standard error, timestamps, and versions of the kernel."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = join([output for output in cell.outputs if output.get("name") != "stderr"])
    return notebook


def join(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """`outputs` with printed text in one piece, which arrives in as many as it was flushed in."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main() -> None:
    """Execute what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--to", type=Path, help="folder to save in; by default each replaces what it was")
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        print(path.name, flush=True)
        nbformat.write(tidy(execute(path)), (arguments.to or path.parent) / path.name)


if __name__ == "__main__":
    main()
