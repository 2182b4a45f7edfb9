import builtins

import jax
import pytest


@pytest.fixture(autouse=True)
def precision():
    """Benchmarks set the precision of all products of their process."""
    before = jax.config.values["jax_default_matmul_precision"]
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture
def without_torch(monkeypatch):
    """PyTorch is not installed, as the package sees it."""
    imported = builtins.__import__

    def find(name, importer=None, *rest, **kwargs):
        if name == "torch" and importer["__name__"].startswith("pspinal_jax"):
            raise ImportError(name)
        return imported(name, importer, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", find)
