"""Checksums of trees of arrays. Orbax restores a file with a flipped byte without a word."""

import json
import zlib
from typing import Any

import jax
import numpy as np


def tree_checksums(tree: Any) -> dict[str, str]:
    """CRC-32 of every leaf's bytes, dtype and shape, by its path in the tree."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _leaf_checksum(leaf) for path, leaf in leaves}


def json_checksum(value: Any) -> str:
    """CRC-32 of a JSON value, whatever the order of its keys."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def _leaf_checksum(leaf: Any) -> str:
    array = np.asarray(leaf)
    head = f"{array.dtype}{array.shape}".encode()
    return f"{zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, zlib.crc32(head)):08x}"
