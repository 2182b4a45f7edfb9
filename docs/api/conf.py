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
napoleon_custom_sections = [("Attributes", "params_style")]
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings give shapes and dtypes, which say more than jax.Array
html_theme = "alabaster"
html_show_sourcelink = False


def shorten(app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """Without the arguments that linen adds to every module."""
    return (signature and re.sub(r", parent=.*\)$", ")", signature)), returns


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out fields that have no docstring of their own but a default with one."""
    foreign = str(getattr(obj, "__module__", "")).startswith(("jax", "flax"))
    return True if foreign or str(obj.__doc__).startswith("Alias for field number") else None


def keep(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon: it takes what stands before a colon in a field's docstring for the field's type."""
    if what == "attribute":
        fields[name] = list(lines)


def restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """After napoleon."""
    lines[:] = fields.pop(name, lines)


fields: dict[str, list[str]] = {}


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", restore, priority=600)
