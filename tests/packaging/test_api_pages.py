"""`make docs` in small: the API pages build without a warning, and show what docstrings say."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "docs" / "api"


@pytest.mark.slow
def test_the_api_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-E", "-W", "--keep-going", SOURCE, tmp_path]
    built = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = html.unescape(re.sub(r"<[^>]+>", "", (tmp_path / "index.html").read_text()))
    head = page[page.index("class pspinal_jax.heads.ProgressiveSpinalHead") :]
    head = head[: head.index("class pspinal_jax.heads.SpinalHead")]
    for shown in ("Attributes:", "W, width of each hidden layer.", "Parameters:", "Returns:", "Raises:"):
        assert shown in head
    assert "parent" not in head.split(")")[0]  # linen's own argument
    assert ": the head sees the pixels or features as they are" in page  # a field's docstring, whole
