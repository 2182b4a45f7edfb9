"""Sphinx: the API pages from the docstrings. `make docs` builds them, and fails on a warning."""

import re
from typing import Any

import pspinal_jax

project = "pspinal_jax"
author = "the pspinal_jax authors"
copyright = author
release = pspinal_jax.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "obj"  # `name` in a docstring links to what is called so
napoleon_use_ivar = True
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings give shapes and dtypes, which say more than jax.Array
html_theme = "alabaster"
html_show_sourcelink = False


def shorten(app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """Without the arguments that linen adds to every module."""
    return (signature and re.sub(r", parent=.*\)$", ")", signature)), returns


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", shorten)
