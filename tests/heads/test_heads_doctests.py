"""The examples in the docstrings of the heads run and print what they say."""

import doctest
import importlib
import pathlib

import pytest

import pspinal_jax.heads

MODULES = ["progressive", "spinal", "mlp", "dense"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"pspinal_jax.heads.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_no_module_with_examples_is_left_out():
    files = pathlib.Path(pspinal_jax.heads.__file__).parent.glob("*.py")
    assert {file.stem for file in files if ">>>" in file.read_text()} == set(MODULES)
