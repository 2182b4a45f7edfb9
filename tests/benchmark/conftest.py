import jax
import pytest


@pytest.fixture(autouse=True)
def compilation_cache():
    """A benchmark switches the compilation cache of its process."""
    name = "jax_enable_compilation_cache"
    before = jax.config.values[name]
    yield
    jax.config.update(name, before)


@pytest.fixture
def without_torch(monkeypatch):
    """PyTorch is not installed, as the package sees it."""
    for module in ("timing", "run", "steps", "head", "whole"):
        monkeypatch.setattr(f"pspinal_jax.benchmark.{module}.has_torch", lambda: False)
