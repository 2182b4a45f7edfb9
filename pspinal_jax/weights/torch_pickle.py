"""The pickles of torch.save, read without unpickling: nothing that a file names is looked up, and nothing called.

A pickle is a program for a small stack machine. This one knows the two dozen instructions that torch.save writes and a
fixed list of names, which stand for builders of its own; at the first other instruction or name it stops. It imports
nothing, sets no attributes and calls nothing that a file could choose. Instructions are told apart by pickletools of
the standard library, which reads them and runs none.
"""

import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np

from pspinal_jax.weights.layout import told

WIDTHS = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1,
    "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
"""Bytes of a number, by dtype."""
_MOST_AXES, _LARGEST_SIZE = 64, 2**63 - 1
"""NumPy's limits; beyond them a product of sizes could take for ever."""
_LARGEST_KEY = 2**32
"""Of numbers as keys of a dict: beyond it they could be chosen to share one hash."""


class _Dtype(NamedTuple):
    """A dtype, or kind of storage, by PyTorch's name; None for bytes, whose dtype is told later."""

    name: str | None


class Refused(Exception):
    """The file asks for something that no state dict needs."""


class _NoText:
    """Stands for a name in a dict that is no text, a tuple say, whose hash could take for ever."""

    def __init__(self, name: Any) -> None:
        self.told = str(name) if type(name) in (int, float, bool) else f"a {type(name).__name__}"

    def __str__(self) -> str:
        return self.told


class Storage:
    """Numbers that tensors are views of; `data` is found after the pickle was read."""

    def __init__(self, dtype: _Dtype, key: str, count: int) -> None:
        self.dtype, self.key, self.count = dtype, key, count
        self.data: memoryview | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
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
    storage: Storage
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
        if data is None or (last + 1) * width > len(data):
            raise ValueError("a tensor reaches beyond its storage")
        steps = tuple(stride * width for stride in self.strides)
        array: np.ndarray = np.ndarray(self.shape, dtype.newbyteorder("<"), data, self.offset * width, steps)
        return -array if self.negative else array


class Machine:
    """Runs one pickle of torch.save's.

    Attributes:
      storages: those that its tensors are views of, by their keys.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickled: Any) -> Any:
        """The object of the pickle in `pickled`, bytes or a file, which is read to the pickle's end and no further."""
        for opcode, argument, _ in pickletools.genops(pickled):
            step = _STEPS.get(opcode.name)
            if step is None:
                raise Refused(f"the instruction {opcode.name}")
            try:
                step(self, argument)
            except (IndexError, KeyError) as error:
                raise ValueError("its pickle takes what is not there") from error
        (result,) = self._stack
        if self._below:
            raise ValueError("its pickle ends early")
        return result

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self, _: None) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._below.pop()
        return values

    def _tuple(self, count: int | None) -> None:
        values = self._since_mark() if count is None else [self._stack.pop() for _ in range(count)][::-1]
        self._push(tuple(values))

    def _put(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def _get(self, key: int) -> None:
        self._push(self._memo[key])

    def _text(self, text: str) -> None:
        # pickletools gives the bytes of Python 2's text as latin-1.
        self._push(text.encode("latin-1").decode())

    def _append(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("its pickle appends to no list")
        self._stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not dict or len(values) % 2:
            raise ValueError("its pickle sets entries of no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            plain = type(key) is str or (type(key) is int and 0 <= key < _LARGEST_KEY)
            self._stack[-1][key if plain else _NoText(key)] = value

    def _name(self, name: str) -> None:
        if name not in _NAMES:
            raise Refused(told(name.replace(" ", ".")))
        self._push(_NAMES[name])

    def _call(self, _: None) -> None:
        arguments, builder = self._stack.pop(), self._stack.pop()
        if not isinstance(builder, _Builder) or type(arguments) is not tuple:
            raise Refused("a call of what cannot be called")
        self._push(builder.build(arguments))

    def _build(self, _: None) -> None:
        """The attributes of an OrderedDict, `_metadata` of a state dict: left out."""
        self._stack.pop()
        if type(self._stack[-1]) is not dict:
            raise Refused("attributes of what is no dict")

    def _persistent(self, _: None) -> None:
        kind, dtype, key, _, count, *view = self._stack.pop()
        if kind != "storage" or not isinstance(dtype, _Dtype) or type(key) is not str or not _is_size(count):
            raise Refused("something else than a storage beside the pickle")
        if view not in ([], [None]):
            raise ValueError("a storage is a view of another one")
        known = self.storages.setdefault(key, Storage(dtype, key, count))
        if (known.dtype, known.count) != (dtype, count):
            raise ValueError("two storages have the same key")
        self._push(known)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_SIZE


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    """_rebuild_tensor_v2; `rest` is requires_grad, hooks and perhaps which bits are set."""
    _, _, bits = rest if len(rest) == 3 else (*rest, None)
    return _view(storage, storage.dtype, offset, shape, strides, bits)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, bits: Any = None
) -> StoredTensor:
    """_rebuild_tensor_v3, of dtypes that have no kind of storage of their own."""
    return _view(storage, dtype, offset, shape, strides, bits)


def _view(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any, bits: Any) -> StoredTensor:
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not isinstance(dtype, _Dtype) or not all(map(_is_size, sizes)):
        raise ValueError("a tensor is no view of a storage")
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= _MOST_AXES:
        raise ValueError("a tensor has too many axes, or not a stride for each")
    bits = {} if bits is None else bits
    if type(bits) is not dict or not bits.keys() <= {"conj", "neg"} or not {*map(type, bits.values())} <= {bool}:
        raise ValueError("a tensor has bits that are not known")
    kind = dtype.name or "bytes"
    if (bits.get("neg") and kind == "bool") or (bits.get("conj") and not kind.startswith("complex")):
        raise ValueError(f"a tensor of {kind} has a bit of other numbers")
    return StoredTensor(kind, storage, offset, shape, strides, bits.get("neg") is True)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    if not isinstance(data, StoredTensor):
        raise ValueError("a Parameter holds no tensor")
    return data


class _Builder:
    """Ours, for a name of PyTorch's that a pickle calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def build(self, arguments: tuple[Any, ...]) -> Any:
        return self._function(*arguments)


_STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool", "Byte": "uint8",
    "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
_NAMES: dict[str, _Builder | _Dtype] = {
    "collections OrderedDict": _Builder(_ordered_dict),
    "torch._utils _rebuild_tensor_v2": _Builder(_tensor),
    "torch._utils _rebuild_tensor_v3": _Builder(_typed_tensor),
    "torch._utils _rebuild_parameter": _Builder(_parameter),
    "torch.storage UntypedStorage": _Dtype(None),
    **{f"torch {name}Storage": _Dtype(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch {name}": _Dtype(name) for name in WIDTHS},
}
"""All names that a file may hold; none of them is imported."""

_STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, version: None,
    "STOP": lambda machine, _: None,
    "MARK": Machine._mark,
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "TUPLE": lambda machine, _: machine._tuple(None),
    **{f"TUPLE{n}": lambda machine, _, n=n: machine._tuple(n) for n in (1, 2, 3)},  # type: ignore[misc]
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), Machine._push),
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING"), Machine._text),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Machine._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), Machine._get),
    "APPEND": lambda machine, _: machine._append([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._since_mark()),
    "SETITEM": lambda machine, _: machine._set([machine._stack.pop() for _ in range(2)][::-1]),
    "SETITEMS": lambda machine, _: machine._set(machine._since_mark()),
    "GLOBAL": Machine._name,
    "REDUCE": Machine._call,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
}
