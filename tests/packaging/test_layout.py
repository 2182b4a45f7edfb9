"""Imports point one way, as CONTRIBUTING.md lists the folders."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TOP = ["__init__", "__main__", "environment", "progress"]  # the package's own names, and the entry of the command line
FREE = ["errors", "files", "log_filter", "network"]  # for everybody; they import nothing of ours


def order():
    listed = re.search(r"```\n(pspinal_jax/errors.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    lines = [line for line in listed.splitlines() if line.startswith("pspinal_jax/")]
    return [name for line in lines for name in re.findall(r"(?:pspinal_jax/|, )(\w+)/", line)]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pspinal_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("pspinal_jax."))


def test_every_folder_imports_only_what_is_listed_above_it():
    package = REPOSITORY / "pspinal_jax"
    layers = FREE + order()
    assert sorted(layers + TOP) == sorted(
        path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    )
    for layer in layers:
        paths = [package / f"{layer}.py"] if layer in FREE else (package / layer).rglob("*.py")
        allowed = set() if layer in FREE else {"environment", "progress"} | set(layers[: layers.index(layer) + 1])
        wrong = [(path.name, name) for path in paths for name in imports(path) if name not in allowed]
        assert not wrong, f"{layer} may not import these: {wrong}"
