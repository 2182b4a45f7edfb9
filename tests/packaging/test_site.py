"""`make docs`: the site builds without a warning, its links lead somewhere, and it shows what docstrings say."""

import html
import re
import shutil
import subprocess
import sys
import urllib.parse
from importlib import import_module
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
from PIL import Image

from pspinal_jax.__main__ import COMMANDS

REPOSITORY = Path(__file__).parents[2]
PUBLIC = ("", ".heads", ".backbones", ".augment", ".recipes", ".data", ".weights")
PAGES = ("index", "quickstart", "photographs", "command_line", "api/heads")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("sphinx", "myst_nb", "sphinx_book_theme"):
        pytest.importorskip(name)
    built = tmp_path_factory.mktemp("site")
    options = ["-b", "html", "-q", "-E", "-W", "--keep-going", "-c", "docs", "-d", str(built / ".doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, ".", str(built)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return built


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_docstrings_are_shown_whole(site):
    page = text_of(site / "docs" / "api" / "heads.html")
    head = page[page.index("class pspinal_jax.heads.ProgressiveSpinalHead") :]
    head = head[: head.index("class pspinal_jax.heads.SpinalHead")]
    for shown in ("Attributes:", "W, width of each hidden layer.", "Parameters:", "Returns:", "Raises:"):
        assert shown in head
    assert "parent" not in head.split(")")[0]  # linen's own argument
    types = re.sub(r"\s+", " ", head[:1000])
    assert "num_layers: int = 4," in types and "activation: Callable[[Array], Array] = relu," in types
    recipes = text_of(site / "docs" / "api" / "recipes.html")
    assert ": the head sees the pixels or features as they are" in recipes  # a field's docstring, whole


def test_every_public_name_and_every_command_has_its_place(site):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", urllib.parse.urljoin)
    documented = {
        name
        for kind, names in getattr(inventory, "data", inventory).items()
        if kind.startswith("py:")
        for name in names
    }
    names = {name.rpartition(".")[2] for name in documented}
    for room in PUBLIC:
        module = import_module(f"pspinal_jax{room}")
        public = [name for name in module.__all__ if isinstance(getattr(module, name), type | FunctionType)]
        assert set(public) <= names, f"pspinal_jax{room}"
    page = (site / "docs" / "command_line.html").read_text()
    assert all(f'id="command-{name}"' in page for name in COMMANDS)


def test_every_link_and_anchor_of_the_site_leads_somewhere(site):
    targets: dict[Path, set[str]] = {}
    pages = [page for page in site.rglob("*.html") if {"_static", "_downloads"}.isdisjoint(page.parts)]
    assert len(pages) > 30
    for page in pages:
        for link in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
            url = urllib.parse.urlsplit(html.unescape(link))
            if url.scheme or url.netloc:
                continue
            target = (page.parent / urllib.parse.unquote(url.path)).resolve() if url.path else page
            assert target.exists(), f"{page.relative_to(site)} links to {link}"
            if url.fragment and target.suffix == ".html":
                if target not in targets:
                    targets[target] = set(re.findall(r'\bid="([^"]+)"', target.read_text()))
                assert urllib.parse.unquote(url.fragment) in targets[target], f"{page.relative_to(site)}: {link}"


def chromium(*arguments):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("Chromium is not installed")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--hide-scrollbars"]
    return subprocess.run(
        [browser, *options, *arguments], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_the_search_finds_the_head(site):
    address = f"{(site / 'search.html').as_uri()}?q=ProgressiveSpinalHead"
    found = chromium("--virtual-time-budget=20000", "--dump-dom", address)
    assert re.search(r'href="[^"]*docs/(api/heads|quickstart)\.html', found), text_of_string(found)[-500:]


def text_of_string(text):
    return re.sub(r"<[^>]+>", " ", text)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width, scheme, brightness", [(1280, "light", (180, 255)), (420, "dark", (0, 100))])
def test_a_page_fits_its_width_in_either_theme(site, name, width, scheme, brightness, tmp_path):
    address, picture, frame = (site / "docs" / f"{name}.html").as_uri(), tmp_path / "page.png", tmp_path / "frame.html"
    theme = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    chromium("--virtual-time-budget=5000", theme, f"--window-size={width},1400", f"--screenshot={picture}", address)
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape == (1400, width) and pixels.std() > 10
    assert brightness[0] <= np.median(pixels) <= brightness[1]
    measure = "document.title = this.contentDocument.documentElement.scrollWidth"
    frame.write_text(f'<iframe src="{address}" style="width: {width}px; border: 0" onload="{measure}"></iframe>')
    found = chromium("--virtual-time-budget=5000", "--dump-dom", frame.as_uri())
    assert int(re.search(r"<title>(\d+)</title>", found)[1]) <= width, "wider than the window"
