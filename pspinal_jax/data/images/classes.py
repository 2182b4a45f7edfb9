"""Class folders: which classes there are, the same in every split, and which images are of each."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from pspinal_jax.errors import DataError

T = TypeVar("T")
_NAMED = 5


def first_names(names: Sequence[str]) -> str:
    """The first few of `names` with commas between them, for a message."""
    return ", ".join(names[:_NAMED]) + (", .." if len(names) > _NAMED else "")


def class_names(found: Mapping[str, Mapping[str, object]], problem: Callable[[str, str], str]) -> tuple[str, ...]:
    """The classes of all splits in `found` (split -> class -> images), sorted.

    Args:
      found: the splits.
      problem: (split, the classes that it lacks) -> what is wrong.

    Raises:
      DataError: if a split lacks a class that another has.
    """
    names = sorted({name for classes in found.values() for name in classes})
    for split, classes in found.items():
        missing = [name for name in names if name not in classes]
        if missing:
            raise DataError(problem(split, first_names(missing)))
    return tuple(names)


def in_order(
    classes: Mapping[str, Sequence[T]], names: Sequence[str], problem: Callable[[str], str]
) -> tuple[list[T], np.ndarray]:
    """The images of all classes, class by class, and their labels int32 [N].

    Raises:
      DataError: if a class has none; `problem` says so, given the class's name.
    """
    for name in names:
        if not classes[name]:
            raise DataError(problem(name))
    images = [image for name in names for image in classes[name]]
    return images, np.repeat(np.arange(len(names), dtype=np.int32), [len(classes[name]) for name in names])
