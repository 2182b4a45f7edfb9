"""Configuration of the documentation site. `make docs` builds it offline in build/docs, and fails on a warning.

The source directory is the repository, so that links between Markdown files work on the site as they do in the files.
The first page is README; the rest of the tree is in docs/index.md.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

import pspinal_jax
from pspinal_jax.__main__ import COMMANDS, main

REPOSITORY = Path(__file__).parents[1]
SHOWN_AS = {"../README.md": "index.md", "../configs": "recipes.rst"}
SHOWN_AS["../notebooks"] = "../notebooks/1_head_in_five_minutes.ipynb"
"""Target of a link -> page of the site."""

project = "pspinal_jax"
author = "the pspinal_jax authors"
copyright = author
release = pspinal_jax.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "results/*.md",
    "results/**/*.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "pspinal_jax", "tests", "configs", "results/not_run.md"]
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}
html_theme = "sphinx_book_theme"
html_title = "pspinal_jax"
html_theme_options = {"use_download_button": False, "navbar_persistent": []}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
suppress_warnings = ["toc.not_included", "myst.header"]  # reports of single results, which pages link to
nb_execution_mode = "off"  # make test-notebooks runs them
myst_heading_anchors = 4
default_role = "obj"  # `name` in a docstring links to what is called so
napoleon_custom_sections = [("Attributes", "params_style")]
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88


class Commands(Directive):
    """``.. commands::`` is a section for each command."""

    def run(self) -> list[nodes.Node]:
        """Make the sections."""
        found = []
        for name, summary in COMMANDS.items():
            about = nodes.paragraph("", f"{summary[0].upper()}{summary[1:]}.")
            section = nodes.section("", nodes.title("", name), about, ids=[f"command-{name}"])
            text = printed([name, "--help-all"]) or printed([name, "--help"])
            section += nodes.literal_block(text, text, language="text")
            found.append(section)
        return found


class Recipes(Directive):
    """``.. recipes::`` is the list of recipes."""

    def run(self) -> list[nodes.Node]:
        """Make a block of the list."""
        return [nodes.literal_block(text := printed(["recipes"]), text, language="text")]


def printed(arguments: list[str]) -> str:
    """The output of a command at 80 columns."""
    silent = contextlib.redirect_stderr(io.StringIO())
    with contextlib.redirect_stdout(io.StringIO()) as text, silent, contextlib.suppress(SystemExit):
        main(arguments)
    return text.getvalue().rstrip()


def read(app: Any, name: str, source: list[str]) -> None:
    """Put README at the start of the first page, with its links adjusted, and point links to README to that page."""
    if name == root_doc:
        readme = re.sub(r"\]\((?!https?:|#)", "](../", (REPOSITORY / "README.md").read_text())
        source[0] = f"{readme}\n{source[0]}"
    for file, page in SHOWN_AS.items():
        source[0] = source[0].replace(f"]({file})", f"]({page})")


def shorten(app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """Remove the arguments that linen adds to every module, and show defaults by name, which Sphinx can parse."""
    if signature:
        signature = re.sub(r", parent[:=].*\)$", ")", signature)
        signature = re.sub(r"<(?:function (\w+)|class '(?:\w+\.)*(\w+)')[^>]*>", r"\1\2", signature)
    return signature, returns


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out fields without a docstring, whose default has one."""
    foreign = str(getattr(obj, "__module__", "")).startswith(("jax", "flax", "sklearn"))
    return True if foreign or str(obj.__doc__).startswith("Alias for field number") else None


def keep(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep a field's docstring, of which napoleon takes everything before a colon for the field's type."""
    if what == "attribute":
        fields[name] = list(lines)


def restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Restore the docstring after napoleon has run."""
    lines[:] = fields.pop(name, lines)


fields: dict[str, list[str]] = {}


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read)
    for directive, name in ((Commands, "commands"), (Recipes, "recipes")):
        app.add_directive(name, directive)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", restore, priority=600)
