"""A small network under the name of a real one, and pictures to train it on."""

import drawn_pictures
import pytest

from pspinal_jax.backbones import resnet
from pspinal_jax.weights import resnet as layout


@pytest.fixture
def tiny_resnet(monkeypatch):
    """resnet18 with one block a stage and few channels: what runs here compiles in seconds."""
    monkeypatch.setitem(resnet.VARIANTS, "resnet18", resnet.Variant((1, 1, 1, 1), 1))
    monkeypatch.setattr(resnet, "STAGE_CHANNELS", (4, 4, 8, 8))
    layout._entries.cache_clear()  # it remembers a variant's tensors by the variant's name
    yield
    layout._entries.cache_clear()


@pytest.fixture
def tiny_flags(tiny_resnet):
    """Flags that make any photograph recipe small."""
    return drawn_pictures.TINY


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Three classes of 14 pictures."""
    folder = tmp_path_factory.mktemp("pictures") / "shapes"
    return drawn_pictures.write_folder(folder, 14, side=40, shapes=drawn_pictures.SHAPES[:3])
