"""The PyTorch peers of the backbones serve here too; a file that must be refused."""

import sys
from pathlib import Path

import pytest

from pspinal_jax.errors import DataError
from pspinal_jax.weights import read_state_dict

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))


@pytest.fixture
def refusal(tmp_path):
    def refuse(content):
        path = tmp_path / "x.pt"
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_state_dict(path)
        told = str(caught.value)
        assert told.startswith(f"weights: {path} ") and told.isprintable() and len(told) < 700 + len(str(path))
        return told

    return refuse
