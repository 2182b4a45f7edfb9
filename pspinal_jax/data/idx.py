"""Reading IDX, the format of MNIST and its kin: a magic number, big-endian sizes, then the values and nothing else."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pspinal_jax.errors import DataError

UINT8 = np.dtype(np.uint8)
INT32 = np.dtype(">i4")
_CODES = {UINT8: 0x08, INT32: 0x0C}
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20


def read_idx(source: Path | bytes, where: str, dtype: np.dtype, item_shape: tuple[int, ...]) -> np.ndarray:
    """The array in an IDX file, plain or gzip (told by its content, not its name).

    Args:
      source: a path, or the file's bytes.
      where: what to call the file in errors.
      dtype: UINT8 or INT32, as the file must say.
      item_shape: shape of one item, () for labels, as the file must say.

    Returns:
      Array [N, *item_shape] with N at least 1, uint8 or native int32.

    Raises:
      DataError: if the file is cut short, goes on after its data, is damaged, or is of another type or shape.
    """
    try:
        with _decompressed(source) as stream:
            return _parse(stream, where, dtype, item_shape)
    except EOFError:
        raise DataError(f"{where} is cut short: its gzip stream has no end; get the file again") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{where} cannot be read: {error}; get the file again") from error


@contextlib.contextmanager
def _decompressed(source: Path | bytes) -> Iterator[io.BufferedIOBase]:
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        is_gzip = stream.read(2) == _GZIP_MAGIC
        stream.seek(0)
        if not is_gzip:
            yield stream
            return
        with gzip.open(stream) as decompressed:
            yield decompressed


def _parse(stream: io.BufferedIOBase, where: str, dtype: np.dtype, item_shape: tuple[int, ...]) -> np.ndarray:
    expected = bytes([0, 0, _CODES[dtype], 1 + len(item_shape)])
    magic = stream.read(4)
    if magic != expected:
        raise DataError(
            f"{where} begins with the bytes {magic.hex(' ') or '(none)'}, expected {expected.hex(' ')} (IDX of "
            f"{dtype.name} with {expected[3]} dimensions); it is another kind of file"
        )
    header = stream.read(4 * expected[3])
    if len(header) < 4 * expected[3]:
        raise DataError(f"{where} ends within its header; get the file again")
    count, *found = map(int, np.frombuffer(header, ">u4"))
    if tuple(found) != item_shape:
        raise DataError(f"{where} holds items of shape {tuple(found)}, expected {item_shape}")
    if count == 0:
        raise DataError(f"{where} holds no examples")
    num_bytes = count * int(np.prod(item_shape, dtype=np.int64)) * dtype.itemsize
    values = _read_up_to(stream, num_bytes)
    if len(values) < num_bytes:
        raise DataError(
            f"{where} says it holds {count} items ({num_bytes} bytes) but has {len(values)} bytes; get the file again"
        )
    # Reading on to the end is also what makes gzip compare its checksum.
    if stream.read(1):
        raise DataError(f"{where} goes on after the {count} items that it says it holds; get the file again")
    return np.frombuffer(values, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(count, *item_shape)


def _read_up_to(stream: io.BufferedIOBase, num_bytes: int) -> bytearray:
    """At most `num_bytes`, piece by piece: a header that lies must not make us allocate what it says."""
    values = bytearray()
    while len(values) < num_bytes:
        piece = stream.read(min(_CHUNK, num_bytes - len(values)))
        if not piece:
            break
        values += piece
    return values
