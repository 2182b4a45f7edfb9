"""Values of the type that an annotation has: what Python code and JSON files give is checked before it is used."""

import dataclasses
import numbers
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pspinal_jax.errors import UsageError
from pspinal_jax.files import expanded

_LARGEST = 2**63  # of whole numbers, in which sizes are counted
_LONGEST_VALUE = 200


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` has it: paths of text, tuples of lists, dataclasses of dicts.

    Args:
      name: of the value, for the message.
      value: anything.
      hint: a class, Any, Literal, list[T], dict[str, T], a tuple of fixed length, a dataclass, a TypedDict (whose other
        keys are left as they are), or a union of these.

    Raises:
      UsageError: if it is of another type, lacks a key or has one too many; and what a dataclass raises.
    """
    for kind in typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,):
        origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
        if origin is Any:
            return value
        if origin is Literal:
            if isinstance(value, str) and value in inner:
                return value
        elif origin in (int, float):
            if isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) < _LARGEST:
                return kind(value)
            if kind is float and isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
                return float(value)
        elif origin is Path:
            if isinstance(value, str | Path) and "\0" not in str(value):
                return expanded(value)
        elif origin is tuple:
            if isinstance(value, Sequence | np.ndarray) and len(value) == len(inner):
                return tuple(typed(name, each, one) for each, one in zip(value, inner, strict=True))
        elif typing.is_typeddict(kind) or (dataclasses.is_dataclass(kind) and isinstance(value, dict)):
            if isinstance(value, dict):
                return _of_fields(name, value, kind)
        elif isinstance(value, origin):
            if inner and isinstance(value, list):
                return [typed(f"{name}.{index}", each, inner[0]) for index, each in enumerate(value)]
            if inner:
                return {key: typed(f"{name}.{key}", each, inner[1]) for key, each in value.items()}
            return value
    expected = " or ".join(map(repr, typing.get_args(hint))) if typing.get_origin(hint) is Literal else hint
    raise UsageError(f"{name} is {value!r:.{_LONGEST_VALUE}}, expected {getattr(expected, '__name__', expected)}")


def _of_fields(name: str, value: dict[str, Any], kind: Any) -> Any:
    """The dataclass or TypedDict `kind` of the dict `value`."""
    hints, made = typing.get_type_hints(kind), dataclasses.is_dataclass(kind)
    if made:
        unset = dataclasses.MISSING
        fields = dataclasses.fields(kind)
        needed = {field.name for field in fields if field.default is unset and field.default_factory is unset}
    else:
        needed = set(kind.__required_keys__)
    if missing := sorted(needed - value.keys()):
        raise UsageError(f"{name} lacks {', '.join(missing)}")
    if made and (unknown := sorted(map(str, value.keys() - hints.keys()))):
        raise UsageError(f"{name} has the unknown setting {unknown[0]:.{_LONGEST_VALUE}}")
    checked = {key: typed(f"{name}.{key}", value[key], hint) for key, hint in hints.items() if key in value}
    return kind(**checked) if made else value | checked
