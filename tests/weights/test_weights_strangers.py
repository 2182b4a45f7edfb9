"""The table of docs/pretrained_weights.md, row by row: taken with the right numbers, or refused in one line."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from pspinal_jax.errors import DataError  # noqa: E402
from pspinal_jax.weights import read_state_dict  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*:UserWarning")]

PAGE = Path(__file__).parents[2] / "docs" / "pretrained_weights.md"
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.read_text().split("\n## ")[1].splitlines()
    if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 3
}
W = torch.arange(-3.0, 9.0).reshape(3, 4)
BITS = (W + 1j).conj()
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]

TAKEN = {
    "float64, float32, float16, bfloat16": [W.double(), W, W.half(), W.bfloat16()],
    "bool, integers of 8 to 64 bits": [W > 0, *(W.abs().to(dtype) for dtype in INTEGERS)],
    "scalars, empty tensors": [torch.tensor(2.5), torch.tensor(7), torch.zeros(0, 3)],
    "views with strides, shared storage, a negative bit": [W.T, W[:, ::2], W[1:], BITS.imag, torch.nn.Parameter(W)],
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's, of prototypes
    SPARSE = [W.to_sparse(), W.to_sparse_csr()]
    NESTED = [torch.nested.nested_tensor([W, W[:1]], layout=layout) for layout in (torch.strided, torch.jagged)]
    QUANTISED = [torch.quantize_per_tensor(W, 0.1, 0, dtype) for dtype in (torch.qint8, torch.quint8)]
REFUSED = {
    "float64 beyond float32's range": [W.double() * 1e300],
    "float8": [W.to(torch.float8_e4m3fn), W.to(torch.float8_e5m2)],
    "complex, conjugate": [W + 1j, BITS],
    "sparse, quantised, meta, nested": [*SPARSE, *QUANTISED, W.to("meta"), *NESTED],
    "larger than the file": [torch.ones(1).expand(10**12), torch.zeros(1, dtype=torch.int32).expand(9, 10**9)],
}
FILES = {
    "entries that are not tensors, names that are not text": [
        {"w": W, "epoch": 3}, {"model": {"w": W}}, {0: W}, [W], W, {"w": [W]}, {"w": None}, {("a", 1): W},
    ],
    "no tensors at all": [{}],
}  # fmt: skip
DAMAGE = {"a flipped bit in the numbers", "cut short, empty, another format under that name", "pickled objects"}


def save_zip(tensors, path):
    torch.save(tensors, path)


def save_older(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def save_safetensors(tensors, path):
    save_file({name: tensor.resolve_conj().contiguous() for name, tensor in tensors.items()}, path)


WRITERS = {"zip": (save_zip, "x.pt"), "older": (save_older, "x.pt"), "safetensors": (save_safetensors, "x.safetensors")}


def refusal(path):
    with pytest.raises(DataError) as caught:
        read_state_dict(path)
    told = str(caught.value)
    assert told.startswith(f"weights: {path} ") and "\n" not in told and len(told) < 600 + len(str(path))
    return told


def cases(table):
    """(row, tensor, writer) of every tensor of `table` and every format that has it."""
    for row, tensors in table.items():
        for index, tensor in enumerate(tensors):
            for writer in WRITERS:
                if writer == "safetensors" and (ROWS[row][0] == "not in the format" or tensor.numel() > 10**9):
                    continue  # `test_a_safetensors_header_that_claims_more` writes that one by hand
                if writer == "older" and (tensor.dtype in INTEGERS[-3:] or row == "float8"):
                    continue  # younger than that format: PyTorch writes them and cannot read them back
                yield pytest.param(row, tensor, writer, id=f"{row}-{index}-{writer}")


def test_the_page_has_the_same_rows():
    assert ROWS.keys() - {"tensor or file"} == {*TAKEN, *REFUSED, *FILES, *DAMAGE}


@pytest.mark.parametrize(("row", "tensor", "writer"), [*cases(TAKEN)])
def test_what_is_taken(tmp_path, row, tensor, writer):
    save, name = WRITERS[writer]
    save({"w": tensor, "again": tensor} if writer != "safetensors" else {"w": tensor}, tmp_path / name)
    assert ROWS[row][0 if writer == "safetensors" else 1].startswith("taken")
    plain = tensor.detach().resolve_neg()
    expected = plain.double().numpy() if plain.is_floating_point() else plain.numpy()
    for array in read_state_dict(tmp_path / name).values():
        assert array.dtype == (np.float32 if plain.is_floating_point() else expected.dtype)
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(("row", "tensor", "writer"), [*cases(REFUSED)])
def test_what_is_refused(tmp_path, row, tensor, writer):
    save, name = WRITERS[writer]
    try:
        save({"good": W.clone(), "w": tensor}, tmp_path / name)
    except (RuntimeError, NotImplementedError, AssertionError, pickle.PicklingError) as error:
        pytest.skip(f"PyTorch does not write it: {error}")
    assert ROWS[row][0 if writer == "safetensors" else 1] == "refused"
    told = refusal(tmp_path / name)
    assert " w " in told or "asks for torch." in told or (row, writer) == ("float8", "safetensors")


@pytest.mark.parametrize("save", [save_zip, save_older])
@pytest.mark.parametrize("row", FILES)
def test_files_that_are_no_state_dict(tmp_path, row, save):
    for held in FILES[row]:
        save(held, tmp_path / "x.pt")
        told, expected = refusal(tmp_path / "x.pt"), ("expected names and tensors alone", "no tensors", "tuple as key")
        assert any(reason in told for reason in expected)
    save({f"{number}": number for number in range(1000)}, tmp_path / "x.pt")
    assert "and 990 more" in refusal(tmp_path / "x.pt")


def test_a_safetensors_file_of_nothing(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    assert "it holds no tensors" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("dtype", "size"), [("F32", 10**12), ("F32", 2**63), ("F32", -1), ("NEW", 1), (7, "x")])
def test_a_safetensors_header_that_claims_more(tmp_path, dtype, size):
    text = json.dumps({"w": {"dtype": dtype, "shape": [size], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    refusal(tmp_path / "x.safetensors")


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """Of the whole archive; what no checksum covers, the zip's padding say, holds no numbers."""
    path = tmp_path / "x.pt"
    torch.save({"w": W}, path)
    content, same = path.read_bytes(), 0
    with zipfile.ZipFile(path) as archive:
        (numbers,) = (entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    start = content.index(W.numpy().tobytes())
    for place in {*range(0, len(content), 7), *range(start, start + numbers.file_size)}:
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        if start <= place < start + numbers.file_size:
            assert "x/data/0" in refusal(path)
            continue
        try:
            read = read_state_dict(path)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            np.testing.assert_array_equal(read["w"], W.numpy())
            same += 1
    assert same < len(content) / 7


def test_a_compressed_archive_is_refused(tmp_path):
    """PyTorch would take its bytes for numbers, as it maps them into memory."""
    torch.save({"w": W}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    assert "is compressed" in refusal(tmp_path / "y.pt")


@pytest.mark.parametrize("save", [save_zip, save_older, save_safetensors])
def test_other_formats_cut_ones_and_empty_ones(tmp_path, save):
    save({"w": torch.ones(300)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    names = ["x.safetensors"] if save is not save_safetensors else ["x.pt", "x.pth", "x.bin"]
    own = WRITERS["safetensors" if save is save_safetensors else "zip"][1]
    damaged = [
        b"",
        content[:1],
        content[:10],
        content[:-1],
        content[: len(content) // 2],
        b"hello",
        b"PK\x03\x04" + bytes(99),
    ]
    for name, held in [*((name, content) for name in names), *((own, each) for each in damaged)]:
        (tmp_path / name).write_bytes(held)
        refusal(tmp_path / name)
