"""State dicts from files, without PyTorch."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pspinal_jax.errors import DataError
from pspinal_jax.weights import read_state_dict, read_variables


def test_safetensors_in_every_precision(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(2, 3)).astype(np.float32),
        "b": rng.normal(size=(4,)).astype(np.float16),
        "c": rng.normal(size=(2, 1, 5)),
        "d": np.asarray(12),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    read = read_state_dict(tmp_path / "x.safetensors")
    assert {name: (array.dtype, array.shape) for name, array in read.items()} == {
        "a": (np.float32, (2, 3)),
        "b": (np.float32, (4,)),
        "c": (np.float32, (2, 1, 5)),
        "d": (np.int64, ()),
    }
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array if name != "c" else array.astype(np.float32))


def write_bfloat16(path):
    """By the format's description: two bfloat16 tensors around one of float32, and metadata."""
    first, second, third = np.float32([1.5, -2.0, 0.0078125]), np.float32([3.25]), np.float32([[-1.0, 1e30]])
    upper = [array.view(np.uint32).ravel() >> 16 for array in (first, third)]
    parts = [upper[0].astype("<u2").tobytes(), second.tobytes(), upper[1].astype("<u2").tobytes()]
    header = {
        "__metadata__": {"format": "pt"},
        "first": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "second": {"dtype": "F32", "shape": [1], "data_offsets": [6, 10]},
        "third": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [10, 14]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    return {"first": first, "second": second, "third": third}


def test_bfloat16_safetensors(tmp_path):
    expected = write_bfloat16(tmp_path / "x.safetensors")
    read = read_state_dict(str(tmp_path / "x.safetensors"))
    assert {array.dtype for array in read.values()} == {np.dtype(np.float32)}
    for name, array in expected.items():
        assert read[name].shape == array.shape
        np.testing.assert_allclose(read[name], array, rtol=2**-7)
    np.testing.assert_array_equal(read["first"], expected["first"])  # exact in bfloat16


def refusal(source):
    with pytest.raises(DataError) as caught:
        read_state_dict(source)
    assert str(caught.value).startswith("weights: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_not_there_or_not_known(tmp_path):
    assert "there is no file" in refusal(tmp_path / "x.safetensors")
    assert "there is no file" in refusal(tmp_path / "x.pt")
    (tmp_path / "x.onnx").touch()
    assert "x.onnx is not one of FILE.safetensors, FILE.pt, FILE.pth and hf:OWNER/NAME" in refusal(tmp_path / "x.onnx")


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, path)
    content = path.read_bytes()
    for damaged in (b"", content[:40], content[:-1], b"\xff" * 50, b"\x80\x04N."):
        path.write_bytes(damaged)
        assert "is not a readable state dict" in refusal(path)


def test_precisions_without_a_numpy_type_are_named(tmp_path):
    text = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    assert "float8_e4m3fn" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("kind", "names"), [("F8_E4M3", ["params/a"]), ("F4", ["params/a"]), ("F32", ["params/a", "params/a/b"])]
)
def test_variables_that_are_none_of_ours_are_one_line(tmp_path, kind, names):
    entries = {name: {"dtype": kind, "shape": [8], "data_offsets": [0, 0]} for name in names}
    size = {"F32": 32, "F8_E4M3": 8, "F4": 4}[kind]
    for index, entry in enumerate(entries.values()):
        entry["data_offsets"] = [size * index, size * (index + 1)]
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(size * len(names))
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"x.safetensors cannot be read as variables"):
        read_variables(tmp_path / "x.safetensors")
