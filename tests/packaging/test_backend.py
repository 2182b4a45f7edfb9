"""A notebook's matplotlib backend is its own: no module of the package changes it."""

import os
import subprocess
import sys

import pytest

IMPORT_ALL = """
import pkgutil, sys
from importlib import import_module
import pspinal_jax

imported = 0
for module in pkgutil.walk_packages(pspinal_jax.__path__, "pspinal_jax."):
    if module.name != "pspinal_jax.__main__":
        try:
            import_module(module.name)
            imported += 1
        except ModuleNotFoundError as error:  # of an extra that is not installed
            assert not error.name.startswith("pspinal_jax"), error
import matplotlib
print(imported, matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.slow
def test_importing_every_module_leaves_the_backend_alone():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"MPLBACKEND": "pdf"},
    )
    imported, backend, pyplot = done.stdout.split()
    assert int(imported) > 100 and (backend, pyplot) == ("pdf", "False"), done.stderr
