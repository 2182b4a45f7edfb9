"""Imports point one way, as CONTRIBUTING.md lists the rooms; old words stay away.

Every import counts: of whole modules and of names, relative ones, those inside functions, and importlib's by a literal
name. `from pspinal_jax import __version__` does not: whoever imports any module has imported the package.
"""

import ast
import graphlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NAME = "pspinal_jax"
OLD_WORDS = re.compile(
    r"\b(lanes|Lanes|batch_shares|read_share|verdicts?|Verdicts?|rehearse|in_form|running_form|from_primary)\b"
)


def listed_rooms():
    """The rooms of CONTRIBUTING.md, from the ground up; each may import those before it."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    block = re.search(r"## The layout.*?```\n(.*?)```", text, re.DOTALL)[1]
    return re.findall(r"^(?:\d|  ) +(\w+)(?:/|\.py) ", block, re.MULTILINE)


def modules(package):
    """Path by the dotted name of every module below the folder `package`."""
    names = {path.relative_to(package.parent).with_suffix(""): path for path in sorted(package.rglob("*.py"))}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in names.items()}


def imports(name, path, known):
    """The modules out of `known`, or what is asked for below the package, that module `name` imports anywhere."""
    parent = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def absolute(module, level):
        base = parent.split(".")[: len(parent.split(".")) - level + 1] if level else []
        return ".".join([*base, *([module] if module else [])])

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module, node.level)
            found = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            # Of an f-string, what stands before its first value.
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            text = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
            bare = text.lstrip(".")
            found = [absolute(bare, len(text) - len(bare)).rstrip(".")]
        else:
            continue
        yield from (module for module in found if module.startswith(f"{NAME}."))


def wrong_directions(package, rooms):
    """Imports of rooms that do not stand before the importer's own, and rooms that are not listed."""
    found = [f"{room} is not listed" for room in rooms_of(package) if room not in rooms]
    known = modules(package)
    for name, path in known.items():
        if name == NAME:
            continue  # the door: it stands above all rooms
        room = name.split(".")[1]
        allowed = rooms[: rooms.index(room) + 1] if room in rooms else []
        found += [f"{name} -> {other}" for other in imports(name, path, known) if other.split(".")[1] not in allowed]
    return found


def rooms_of(package):
    return sorted({name.split(".")[1] for name in modules(package) if name != NAME})


def circle(package):
    """A circle of modules that import each other, or None."""
    known = modules(package)
    graph = {name: {other for other in imports(name, path, known) if other != name} for name, path in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def old_words(package):
    return [
        f"{name}: {word[0]}" for name, path in modules(package).items() if (word := OLD_WORDS.search(path.read_text()))
    ]


def test_the_list_is_the_packages():
    assert sorted(listed_rooms()) == rooms_of(REPOSITORY / NAME)


def test_every_room_imports_only_what_is_listed_above_it():
    assert not wrong_directions(REPOSITORY / NAME, listed_rooms())


def test_no_modules_import_each_other_in_a_circle():
    assert circle(REPOSITORY / NAME) is None


def test_old_words_stay_away():
    assert not old_words(REPOSITORY / NAME)


@pytest.fixture
def house(tmp_path):
    """A package of two rooms, low and high, in which all is well; a function that adds lines to low/a.py."""
    package = tmp_path / NAME
    for room in ("low", "high"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from importlib import import_module\nimport_module('pspinal_jax.high')\n")
    (package / "low" / "b.py").write_text("import json\nfrom pspinal_jax import __version__\n")
    (package / "high" / "c.py").write_text("from pspinal_jax.low import a, b\n")

    def add(text):
        (package / "low" / "a.py").write_text(text)
        return package

    return add


@pytest.mark.parametrize(
    "text",
    [
        "import pspinal_jax.high",
        "from pspinal_jax.high import c",
        "from pspinal_jax.high.c import name",
        "from ..high import c",
        "from ..high.c import name",
        "from .. import high",
        "def lazy():\n    from pspinal_jax.high import c",
        "import importlib\ndef lazy():\n    return importlib.import_module('pspinal_jax.high.c')",
        "from importlib import import_module\nimport_module(f'pspinal_jax.high.{1}')",
        "__import__('pspinal_jax.high')",
    ],
)
def test_every_way_of_importing_is_seen(house, text):
    package = house("from pspinal_jax.low import b\nfrom . import b\n")
    assert not wrong_directions(package, ["low", "high"])
    (wrong,) = wrong_directions(house(text), ["low", "high"])
    assert wrong.startswith("pspinal_jax.low.a -> pspinal_jax.high")


@pytest.mark.parametrize("text", ["from pspinal_jax.low import b", "def lazy():\n    from . import b"])
def test_a_circle_is_seen(house, text):
    package = house(text)
    assert circle(package) is None
    (package / "low" / "b.py").write_text("def lazy():\n    import pspinal_jax.low.a\n")
    assert set(circle(package)) == {"pspinal_jax.low.a", "pspinal_jax.low.b"}


def test_old_words_are_seen(house):
    assert old_words(house("read_share = 1")) == ["pspinal_jax.low.a: read_share"]
