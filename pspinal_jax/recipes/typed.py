"""Checks values from Python code and JSON files against the type that an annotation gives."""

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

_MAX_INT = 2**63
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
        integral = isinstance(value, numbers.Integral)
        whole = integral and not isinstance(value, bool) and abs(int(value)) < _MAX_INT
        if origin is Any or (dataclasses.is_dataclass(kind) and type(value) is kind):
            return value
        if origin is Literal and isinstance(value, str) and value in inner:
            return value
        if (origin in (int, float) and whole) or (origin is float and isinstance(value, numbers.Real) and not integral):
            return origin(value)
        if origin is Path and isinstance(value, str | Path) and "\0" not in str(value):
            return expanded(value)
        if origin is tuple and isinstance(value, Sequence | np.ndarray) and len(value) == len(inner):
            return tuple(typed(name, each, one) for each, one in zip(value, inner, strict=True))
        if isinstance(value, dict) and (typing.is_typeddict(kind) or dataclasses.is_dataclass(kind)):
            return _of_fields(name, value, kind)
        if origin in (list, dict) and inner and isinstance(value, origin):
            if isinstance(value, list):
                return [typed(f"{name}.{index}", each, inner[0]) for index, each in enumerate(value)]
            return {key: typed(f"{name}.{key}", each, inner[1]) for key, each in value.items()}
        if origin in (str, bool, list, dict, type(None)) and isinstance(value, origin):
            return value
    expected = " or ".join(map(repr, typing.get_args(hint))) if typing.get_origin(hint) is Literal else hint
    raise UsageError(f"{name} is {value!r:.{_LONGEST_VALUE}}, expected {getattr(expected, '__name__', expected)}")


def _of_fields(name: str, value: dict[str, Any], kind: Any) -> Any:
    """The dataclass or TypedDict `kind` of the dict `value`."""
    hints, made = typing.get_type_hints(kind), dataclasses.is_dataclass(kind)
    needed = set(getattr(kind, "__required_keys__", ()))
    if made:
        unset = dataclasses.MISSING
        needed = {each.name for each in dataclasses.fields(kind) if each.default is each.default_factory is unset}
    missing, unknown = needed - value.keys(), value.keys() - hints.keys()
    if missing:
        raise UsageError(f"{name} lacks {', '.join(sorted(missing))}")
    if made and unknown:
        raise UsageError(f"{name} has the unknown setting {min(map(str, unknown)):.{_LONGEST_VALUE}}")
    checked = {key: typed(f"{name}.{key}", value[key], hint) for key, hint in hints.items() if key in value}
    return kind(**checked) if made else value | checked
