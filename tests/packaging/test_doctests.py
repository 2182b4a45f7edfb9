"""The examples in all docstrings run and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pspinal_jax"
# They initialise whole backbones, compile in another framework, or train, for seconds.
SLOW = tuple(f"pspinal_jax.{name}" for name in ("backbones.", "interop.", "training.fit", "sklearn", "comparison."))


MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith(SLOW) else []) for name in MODULES]
)
def test_examples(name):
    if name.startswith("pspinal_jax.interop."):
        pytest.importorskip(name, exc_type=ImportError)  # Equinox and Haiku are optional
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
