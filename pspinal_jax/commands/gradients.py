"""`pspinal-jax gradients`: does the progressive head give gradients a short path to every layer?

The study is a script, results/gradients.py, which travels in the wheel.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType

from pspinal_jax.files import shipped


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    status: int = load_study().main(args)
    return status


def load_study() -> ModuleType:
    """The script as a module."""
    loader = SourceFileLoader("pspinal_jax_gradients", str(shipped("results") / "gradients.py"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # where the help finds the text of the flags
    loader.exec_module(module)
    return module
