"""Reading what torch.save wrote, without PyTorch; nothing that a file names is imported or called.

Two formats: a zip archive (PyTorch 1.6 and later) with one pickle and a member for each storage, and the older one:
pickles of a magic number, the protocol, the system, the object and the storages' keys, then each storage's length and
numbers. Pickles are read by the standard library's Unpickler in Python, which takes memory only for what a file holds,
reduced to the instructions that torch.save writes. The names in a pickle stand for functions of ours in a fixed list.
"""

import dataclasses
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np

INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
DTYPES = ("float64", "float32", "float16", "bfloat16", "bool", *INTEGERS)
"""The dtypes that tensors may have, by PyTorch's and NumPy's name."""
_STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool",
    "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64",
}  # fmt: skip
_INSTRUCTIONS = """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BININT BININT1 BININT2
    LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING BINSTRING BINPUT LONG_BINPUT BINGET LONG_BINGET APPEND APPENDS SETITEM
    SETITEMS GLOBAL REDUCE BINPERSID
"""
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What an older file begins with."""


class _Dict(dict[Any, Any]):
    """A dict whose keys are not tuples: of tuples of tuples the hash may take for ever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, tuple):
            raise ValueError("it holds a dict with a tuple as key")
        super().__setitem__(key, value)


@dataclasses.dataclass
class _Storage:
    """Numbers that tensors are views of; `data` is found after the pickle was read."""

    dtype: np.dtype
    count: int
    data: bytes = b""

    def locate(self, data: bytes) -> None:
        """Take the numbers; raises ValueError unless they are as many as the pickle says."""
        if len(data) != self.count * self.dtype.itemsize:
            raise ValueError("a storage has another length than its tensors say")
        self.data = data


class StoredTensor(NamedTuple):
    """A tensor of the file: a view of a storage, with offset and strides in numbers.

    `negative` says that its numbers are stored with the other sign.
    """

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negative: bool

    def array(self) -> np.ndarray:
        """Its numbers, a view of the storage where that is possible; raises ValueError if they lie outside of it."""
        width, data = self.dtype.itemsize, self.storage.data
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        # In Python's integers: NumPy's own check of bounds may overflow.
        last = self.offset + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))
        if (last + 1) * width > len(data):
            raise ValueError("a tensor reaches beyond its storage")
        steps = [stride * width for stride in self.strides]
        array: np.ndarray = np.ndarray(self.shape, self.dtype, data, self.offset * width, steps)
        return -array if self.negative else array


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, bits: Any = None
) -> StoredTensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype) or len(shape) != len(strides):
        raise ValueError("a tensor is not a view of a storage")
    if any(type(size) is not int or size < 0 for size in (offset, *shape, *strides)):
        raise ValueError("a tensor has a size that is not a whole number")
    if bits not in (None, {"neg": True}):
        raise ValueError("a tensor has bits that are not known")
    return StoredTensor(storage, dtype, offset, shape, strides, bool(bits))


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, bits: Any = None
) -> StoredTensor:
    return _rebuild_tensor_v3(storage, offset, shape, strides, grad, hooks, storage.dtype, bits)


_NAMES: dict[str, Any] = {
    "collections.OrderedDict": lambda: _Dict(),
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch.storage.UntypedStorage": np.dtype("uint8"),
    **{f"torch.{name}Storage": np.dtype(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": np.dtype(name) for name in DTYPES},
}
"""All names that a file may hold; none of them is imported."""


def _refuse(unpickler: Any) -> None:
    raise ValueError("its pickle has an instruction that torch.save never writes")


class _Unpickler(pickle._Unpickler):
    stack: list[Any]

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, fix_imports=False, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _NAMES:
            raise ValueError(f"it asks for {module}.{name}, and no code of a file is run")
        return _NAMES[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        known_types = isinstance(dtype, np.dtype) and type(key) is str and type(count) is int
        if kind != "storage" or not known_types or view not in ([], [None]):
            raise ValueError("it has something else than a storage beside the pickle")
        known = self.storages.setdefault(key, _Storage(dtype, count))
        if (known.dtype, known.count) != (dtype, count):
            raise ValueError("two storages have the same key")
        return known

    def make_dict(self) -> None:
        self.stack.append(_Dict())

    def skip_attributes(self) -> None:
        """An OrderedDict's, `_metadata` of a state dict; nothing else has any."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Dict):
            raise ValueError("it sets attributes")

    dispatch: ClassVar[dict[int, Any]] = dict.fromkeys(range(256), _refuse) | {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _INSTRUCTIONS.split()
    }
    dispatch |= {pickle.EMPTY_DICT[0]: make_dict, pickle.BUILD[0]: skip_attributes}


def _unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, _Storage]]:
    """The object of the next pickle in `stream`, and the storages of its tensors by their keys."""
    unpickler = _Unpickler(stream)
    return unpickler.load(), unpickler.storages


def read_torch_file(path: Path) -> Any:
    """What was saved to `path`: dicts, lists, tuples, text, numbers and `StoredTensor`s; a Parameter is its tensor.

    Raises:
      Exception: of any kind, if the file is damaged or holds anything else; nothing of it has run.
    """
    return _read_zip(path) if zipfile.is_zipfile(path) else _read_older(io.BytesIO(path.read_bytes()))


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries, names = archive.infolist(), archive.namelist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which PyTorch's files never are")
        if len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its members overlap or have the same name")
        tops = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(tops) != 1:
            raise ValueError(f"it has {len(tops)} members data.pkl, expected 1")
        if f"{tops[0]}byteorder" in names and archive.read(f"{tops[0]}byteorder") != b"little":
            raise ValueError("its numbers are not in little-endian order")
        held, storages = _unpickle(io.BytesIO(archive.read(f"{tops[0]}data.pkl")))
        for key, storage in storages.items():
            storage.locate(archive.read(f"{tops[0]}data/{key}"))  # which compares the checksum
    return held


def _read_older(stream: io.BytesIO) -> Any:
    magic, protocol, system = (_unpickle(stream)[0] for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or not system.get("little_endian"):
        raise ValueError("its protocol is not known, or its numbers are not in little-endian order")
    (held, storages), (keys, _) = _unpickle(stream), _unpickle(stream)
    for key in keys:
        if type(key) is not str or key not in storages:
            raise ValueError("it has a storage that none of its tensors is a view of")
        storage = storages[key]
        if stream.read(8) != struct.pack("<q", storage.count):
            raise ValueError("a storage has another length than its tensors say")
        storage.locate(stream.read(storage.count * storage.dtype.itemsize))
    if stream.read(1):
        raise ValueError("it goes on after its last storage")
    return held
