"""The examples of docs/interop.md run and learn: each framework's own training loop, and other packages' models."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
HEADS = {"plain_jax": "jax", "nnx": "flax", "equinox": "equinox", "haiku": "haiku"}
OTHER_MODELS = {
    "other_model_jax_resnet": "jax_resnet",
    "other_model_equimo": "equimo",
    "other_model_jimm": "jimm",
    "other_model_nnx_resnet": "flax",
    "features_of_keras": "keras",
    "features_of_sentences": "eqx_zoo",
}
SMALLER = {"other_model_jax_resnet": ["--steps", "60", "--hidden-sizes", "32", "32", "64", "64"]}


@pytest.fixture
def compile_fast():
    """Compiling is what these wait for."""
    was = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", was)


def run_example(name, arguments, monkeypatch, capsys):
    """The accuracies that the example prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return [float(found) for found in re.findall(r"test accuracy (\d\.\d+)", capsys.readouterr().out)]


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns_in_its_framework(name, compile_fast, monkeypatch, capsys):
    pytest.importorskip(HEADS[name])
    (accuracy,) = run_example(f"head_in_{name}", [], monkeypatch, capsys)
    assert accuracy > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_somebody_elses_model_learns_with_the_head(name, monkeypatch, capsys):
    if importlib.util.find_spec(OTHER_MODELS[name]) is None:
        pytest.skip(f"{OTHER_MODELS[name]} is not installed")
    *_, accuracy = run_example(name, SMALLER.get(name, []), monkeypatch, capsys)
    assert accuracy > 0.7


def test_every_example_is_tested_and_documented():
    page = (EXAMPLES.parent / "interop.md").read_text()
    tested = {f"head_in_{name}" for name in HEADS} | {*OTHER_MODELS}
    assert {file.stem for file in EXAMPLES.glob("*.py")} == tested
    assert all(f"examples/{name}.py" in page for name in tested)
