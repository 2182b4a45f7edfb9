import jax
import pytest


@pytest.fixture(autouse=True)
def precision():
    """Benchmarks set the precision of all products of their process, and its compilation cache."""
    names = ("jax_default_matmul_precision", "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def without_torch(monkeypatch):
    """PyTorch is not installed, as the package sees it."""
    for module in ("timing", "run", "steps", "head", "whole"):
        monkeypatch.setattr(f"pspinal_jax.benchmark.{module}.has_torch", lambda: False)
