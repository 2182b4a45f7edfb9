"""Checksums of JSON values, files and trees of arrays. Orbax restores a file with a flipped byte without a word."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pspinal_jax.distributed import rows_of
from pspinal_jax.files import require_file


def tree_checksums(tree: Any) -> dict[str, str]:
    """CRC-32 of every leaf's bytes, dtype and shape, by its path in the tree, wherever the parts lie."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _leaf_checksum(leaf) for path, leaf in leaves}


def json_checksum(value: Any) -> str:
    """CRC-32 of a JSON value, whatever the order of its keys."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def file_checksum(path: Path) -> str:
    """SHA-256 of a file; OSError if it cannot be read."""
    require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _leaf_checksum(leaf: Any) -> str:
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    crc = zlib.crc32(f"{array.dtype}{array.shape}".encode())
    for block in rows_of(array):
        crc = zlib.crc32(np.ascontiguousarray(block).view(np.uint8).data, crc)
    return f"{crc:08x}"
