import builtins

import pytest


@pytest.fixture
def without_torch(monkeypatch):
    """PyTorch is not installed, as the package sees it."""
    imported = builtins.__import__

    def find(name, importer=None, *rest, **kwargs):
        if name == "torch" and importer["__name__"].startswith("pspinal_jax"):
            raise ImportError(name)
        return imported(name, importer, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", find)
