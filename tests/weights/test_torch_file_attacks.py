"""Files of torch.save that an attacker may write: none runs code, reaches beyond the file or takes memory."""

import copyreg
import io
import pickle
import zipfile

import numpy as np
import pytest
from torch_bytes import FORMATS, NUMBERS, as_older, entries, tensor, text

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
    "attributes of a builder": b"ctorch._utils\n_rebuild_tensor_v2\n(N}" + text("build") + b"Nstb",
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
    assert "is not a readable state dict" in told
    assert not canary.exists()


@FORMATS
@pytest.mark.parametrize("attack", DEAD)
def test_nothing_else_is_known(refusal, write, attack):
    told = refusal(write(entries(a=tensor(), w=DEAD[attack])))
    assert "is not a readable state dict" in told


@FORMATS
def test_the_refusal_names_what_was_asked_for(refusal, write):
    assert "asks for os.system, and no code of a file is run" in refusal(write(entries(w=LIVE["os.system"]("true"))))
    assert "an instruction that torch.save never writes" in refusal(write(entries(w=LIVE["a dotted name"]("true"))))
    long = b"c" + b"\x1b[31m" * 1000 + b"\nx\n"
    assert r"\x1b[31m" in refusal(write(entries(w=long)))


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


def bits(name, value=b"\x88"):
    """The instructions of a dict with the bit `name`, which is True."""
    return b"}" + text(name) + value + b"s"


@FORMATS
@pytest.mark.parametrize(
    "odd",
    [
        tensor(kind="BoolStorage", bits=bits("neg")), tensor(bits=bits("conj")), tensor(bits=bits("other")),
        tensor(bits=bits("neg", b"N")), tensor(bits=bits("neg", b"]")), tensor(bits=bits("neg", text("x"))),
        tensor(bits=b"]"), tensor(kind="ComplexFloatStorage", bits=bits("conj")), tensor(bits=b"\x88"),
        tensor((1,), (2**62,)), tensor((0, 2**62), (1, 1)),
    ],
)  # fmt: skip
def test_tensors_with_odd_bits_and_strides(refusal, write, odd):
    refusal(write(entries(a=odd), {"0": np.zeros(6, bool if b"Bool" in odd else np.float32)}))


@FORMATS
def test_bombs_are_refused_before_they_go_off(refusal, write):
    doubled = b"N" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(100))  # 2**100 leaves
    refusal(write(entries(w=doubled)))
    refusal(write(b"\x80\x02}" + doubled + tensor() + b"s."))  # as a name, whose hash would visit them all
    refusal(write(b"\x80\x02X\xff\xff\xff\xff."))  # text of 4 GB that is not there
    refusal(write(b"\x80\x02\x8b\xff\xff\xff\x7f."))  # a number of 2 GB
    refusal(write(b"\x80\x02}r\xff\xff\xff\xff."))  # a place in a list of 32 GB
    refusal(write(b"\x80\x02" + b"(" * 10**5 + b"."))
    refusal(write(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."))
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
    assert "x/data/0" in refusal(archive(pickled))
    assert "another length" in refusal(archive(pickled, ("x/data/0", bytes(20))))
    assert "little-endian" in refusal(archive(pickled, numbers, ("x/byteorder", "big")))
    content = bytearray(archive(pickled, ("x/more", bytes(999)), numbers))
    start = content.rindex(b"PK\x01\x02")  # the numbers become those of the first member, as many as before
    content[start + 42 : start + 46] = bytes(4)
    refusal(bytes(content))


@pytest.mark.parametrize("replaced", [(b"little_endian", b"little_Endian"), (b"\x4d\xe9\x03", b"\x4d\xe8\x03")])
def test_older_files_of_other_machines_and_protocols(refusal, replaced):
    content = as_older(entries(a=tensor()))
    assert replaced[0] in content
    assert "its protocol is not known" in refusal(content.replace(*replaced))
    assert "goes on after its last storage" in refusal(content + b"x")
    swapped = as_older(entries(a=tensor()), {"0": NUMBERS, "1": NUMBERS})
    assert "a storage that none of its tensors is a view of" in refusal(swapped)
