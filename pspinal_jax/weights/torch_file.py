"""Reading what torch.save wrote, without PyTorch; nothing that a file names is imported or called.

Two formats: a zip archive (PyTorch 1.6 and later) with one pickle and a member for each storage, and the older one:
pickles of a magic number, the protocol, the system, the object and the storages' keys, then each storage's length and
numbers. Pickles are read by the standard library's Unpickler, which gets builders of ours for a fixed list of names,
after a look at their instructions: only those that torch.save writes are taken, which leaves no other way to a name.
"""

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np

from pspinal_jax.errors import DataError, printable

WIDTHS = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1,
    "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
"""Bytes of a number, by dtype."""
_STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool", "Byte": "uint8",
    "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
_INSTRUCTIONS = {
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
    "BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "APPEND", "APPENDS", "SETITEM", "SETITEMS",
    "GLOBAL", "REDUCE", "BUILD", "BINPERSID",
}  # fmt: skip
"""Those of pickle's instructions that torch.save writes."""
_MAX_AXES, _MAX_SIZE = 64, 2**63 - 1
"""NumPy's limits; beyond them a product of sizes could take for ever."""
_MAX_SHARED = 10**7
"""Parts of tuples that are used again: tuples of tuples could make a key whose hash takes for ever."""
_ZIP = b"PK\x03\x04"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What an older file begins with."""
_MAX_REASON, _MAX_NAME = 200, 80


class _Refused(Exception):
    """The file asks for something that no state dict needs."""


class _Dtype(NamedTuple):
    """A dtype, or kind of storage, by PyTorch's name; None for bytes, whose dtype the tensor gives."""

    name: str | None


class _Builder(NamedTuple):
    """Ours, for a name of PyTorch's that a pickle calls; a pickle cannot set attributes of a tuple."""

    build: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.build(*arguments)


class _OrderedDict(dict[Any, Any]):
    """A dict that ignores the attributes of PyTorch's, `_metadata` of a state dict."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage:
    """Numbers that tensors are views of; `data` is found after the pickle was read."""

    def __init__(self, dtype: _Dtype, key: str, count: int) -> None:
        self.dtype, self.key, self.count, self.data = dtype, key, count, memoryview(b"")

    def locate(self, data: memoryview) -> None:
        """Take the numbers; raises ValueError unless they are as many as expected."""
        if len(data) != self.num_bytes:
            raise ValueError("a storage has another length than its tensors say")
        self.data = data

    @property
    def num_bytes(self) -> int:
        """Bytes of all numbers."""
        return self.count * WIDTHS[self.dtype.name or "uint8"]


class StoredTensor(NamedTuple):
    """A tensor of the file, whose numbers are not read yet.

    Attributes:
      kind: name of its dtype.
      storage: what it is a view of.
      offset: of its first number, in numbers.
      shape: its shape.
      strides: of its axes, in numbers.
      negative: whether its numbers are stored with the other sign.
    """

    kind: str
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negative: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers, each counted as often as the shape has it."""
        return math.prod(self.shape) * WIDTHS[self.kind]

    def array(self) -> np.ndarray:
        """Its numbers, a view of the file where that is possible.

        Raises:
          ValueError: if they do not lie within the storage.
        """
        dtype, data, width = np.dtype(self.kind), self.storage.data, WIDTHS[self.kind]
        if not math.prod(self.shape):
            return np.zeros(self.shape, dtype)
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if (last + 1) * width > len(data):
            raise ValueError("a tensor reaches beyond its storage")
        steps = tuple(stride * width for stride in self.strides)
        array: np.ndarray = np.ndarray(self.shape, dtype.newbyteorder("<"), data, self.offset * width, steps)
        return -array if self.negative else array


def _short(name: str) -> str:
    return printable(name)[:_MAX_NAME]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _view(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any, bits: Any) -> StoredTensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, _Dtype):
        raise ValueError("a tensor is not a view of a storage")
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= _MAX_AXES:
        raise ValueError("a tensor has too many axes, or not a stride for each")
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise ValueError("a tensor has a negative or huge size")
    bits = {} if bits is None else bits
    if type(bits) is not dict or not bits.keys() <= {"conj", "neg"} or not {*map(type, bits.values())} <= {bool}:
        raise ValueError("a tensor has bits that are not known")
    kind = dtype.name or "bytes"
    if (bits.get("neg") and kind == "bool") or (bits.get("conj") and not kind.startswith("complex")):
        raise ValueError(f"a tensor of {kind} has a bit of other numbers")
    return StoredTensor(kind, storage, offset, shape, strides, bits.get("neg") is True)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, bits: Any = None
) -> StoredTensor:
    return _view(storage, storage.dtype, offset, shape, strides, bits)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, bits: Any = None
) -> StoredTensor:
    """Of dtypes that have no kind of storage of their own."""
    return _view(storage, dtype, offset, shape, strides, bits)


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise ValueError("a Parameter holds no tensor")
    return data


_NAMES: dict[str, _Builder | _Dtype] = {
    "collections.OrderedDict": _Builder(lambda: _OrderedDict()),
    "torch._utils._rebuild_tensor_v2": _Builder(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _Builder(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Builder(_rebuild_parameter),
    "torch.storage.UntypedStorage": _Dtype(None),
    **{f"torch.{name}Storage": _Dtype(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": _Dtype(name) for name in WIDTHS},
}
"""All names that a file may hold; none of them is imported."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled), fix_imports=False, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[f"{module}.{name}"]
        except KeyError:
            raise _Refused(_short(f"{module}.{name}")) from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or not isinstance(dtype, _Dtype) or type(key) is not str or not _is_size(count):
            raise _Refused("something else than a storage beside the pickle")
        known = self.storages.setdefault(key, _Storage(dtype, key, count))
        if view not in ([], [None]) or (known.dtype, known.count) != (dtype, count):
            raise ValueError("a storage is a view of another one, or two have the same key")
        return known


def _unpickle(stream: Any) -> tuple[Any, dict[str, _Storage]]:
    """The object of the next pickle in `stream`, and the storages of its tensors by their keys."""
    start, shared, last, parts = stream.tell(), 0, 0, dict[int, int]()
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name not in _INSTRUCTIONS:
            raise _Refused(f"the instruction {opcode.name}")
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            if argument > len(parts) + 1:
                raise ValueError("its pickle numbers its parts in no order")
            parts[argument] = last
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            shared += parts.get(argument, 0)
        if shared > _MAX_SHARED:
            raise ValueError("its pickle holds tuples of tuples without end")
        last = 1 + shared if "TUPLE" in opcode.name else 0
    end = stream.tell()
    stream.seek(start)
    unpickler = _Unpickler(stream.read(end - start))
    return unpickler.load(), unpickler.storages


def read_torch_file(path: Path) -> Any:
    """What was saved to `path`: dicts, lists, tuples, text, numbers and `StoredTensor`s; a Parameter is its tensor.

    Tensors are read from the file when `StoredTensor.array` is called, which therefore must stay as it is until then.

    Raises:
      DataError: if the file is damaged, as far as its format tells, or holds anything else; nothing of it has run.
    """
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _read_zip(path, content) if content[:4] == _ZIP else _read_older(content)
    except _Refused as error:
        raise DataError(
            f"weights: {path} is damaged or holds pickled objects beside tensors ({error}), and is not read, because "
            "unpickling can run any code; where you trust it, re-save it as a state dict: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        why = (str(error).splitlines() or [type(error).__name__])[0][:_MAX_REASON]
        raise DataError(f"weights: {path} is not a readable PyTorch file ({why}); fetch or save it again") from error


def _read_zip(path: Path, content: mmap.mmap) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
        _check_members(archive, list(members.values()), len(content))
        tops = [
            name.removesuffix("data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(tops) != 1:
            raise ValueError(f"it has {len(tops)} members data.pkl, expected 1")
        top = tops[0]
        if f"{top}constants.pkl" in members:
            raise _Refused("a TorchScript program")
        if f"{top}byteorder" in members and archive.read(f"{top}byteorder") != b"little":
            raise ValueError("its numbers are not in little-endian order")
        held, storages = _unpickle(io.BytesIO(archive.read(f"{top}data.pkl")))
    view = memoryview(content)
    for key, storage in storages.items():
        entry = members.get(f"{top}data/{key}")
        if entry is None:
            raise ValueError(f"it has no member {_short(f'{top}data/{key}')}")
        lengths = struct.unpack("<HH", content[entry.header_offset + 26 : entry.header_offset + 30])
        start = entry.header_offset + 30 + sum(lengths)
        storage.locate(view[start : start + entry.file_size])
    return held


def _check_members(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse what torch.save never writes, before anything is unpacked, and compare the checksums."""
    if len(archive.infolist()) != len(entries):
        raise ValueError("two members have the same name")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise ValueError(f"{_short(entry.filename)} is compressed, which PyTorch's files never are")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its members overlap")
    bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"{_short(bad)} is damaged")


def _read_older(content: mmap.mmap) -> Any:
    magic, protocol, system = (_unpickle(content)[0] for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or not system.get("little_endian"):
        raise ValueError("its protocol is not known, or its numbers are not in little-endian order")
    (held, storages), (keys, _) = _unpickle(content), _unpickle(content)
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    view, start = memoryview(content), content.tell()
    for key in keys:
        (count,) = struct.unpack("<q", view[start : start + 8])
        storage = storages[key]
        if count != storage.count:
            raise ValueError("a storage has another length than its tensors say")
        storage.locate(view[start + 8 : start + 8 + storage.num_bytes])
        start += 8 + storage.num_bytes
    if start != len(content):
        raise ValueError("it goes on after its last storage")
    return held
