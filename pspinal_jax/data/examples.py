"""What a data set is prepared from."""

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from pspinal_jax.data.images.images import Encoded

Images: TypeAlias = np.ndarray | Encoded
"""uint8 [N, H, W, C], or N encoded pictures."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Checked examples, ready to be written.

    Attributes:
      splits: split -> (images, labels [N], each 0 .. C-1).
      class_names: in the order of the labels.
      skipped: names of the pictures that were left out because they cannot be decoded.
    """

    splits: Mapping[str, tuple[Images, np.ndarray]]
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
