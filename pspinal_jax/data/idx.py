"""Reading MNIST and its kin as published, in a folder or a zip.

Their format is IDX: a magic number, big-endian sizes, then the values and nothing else.
"""

import contextlib
import gzip
import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pspinal_jax.data.archives import MOST_BYTES, open_zip, read_zip_member
from pspinal_jax.data.catalogue import CATALOGUE, DataSet
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
    if num_bytes > MOST_BYTES:
        raise DataError(f"{where} says it holds {num_bytes} bytes, expected at most {MOST_BYTES}; get the file again")
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


Arrays: TypeAlias = dict[str, tuple[np.ndarray, np.ndarray]]
"""Split -> (images uint8 [N, H, W, C], labels int32 [N], each 0 .. C-1)."""

_LABELS_MOST_BYTES = 2**20

_Open: TypeAlias = Callable[[str], tuple[Path | bytes, str]]
"""From a file's name upstream to what `read_idx` takes: the source, and what to call it."""


def read_raw(data_set: DataSet, place: Path) -> Arrays:
    """The splits 'train' and 'test' of `data_set` from the raw files in `place`, images upright, labels from 0.

    Args:
      data_set: which set.
      place: folder with the files under their names upstream, gzip or not; for EMNIST also the folder of the zip or of
        what it extracts to, or the zip itself.

    Raises:
      DataError: if files are missing, damaged, or do not belong together.
    """
    with _opener(data_set, place) as open_file:
        return {split: _read_split(data_set, files, open_file) for split, files in data_set.files.items()}


def _read_split(data_set: DataSet, files: Sequence[str], open_file: _Open) -> tuple[np.ndarray, np.ndarray]:
    image_file, label_file = files
    height, width, _ = data_set.image_shape
    assert height is not None and width is not None, data_set.name
    source, where_images = open_file(image_file)
    images = read_idx(source, where_images, UINT8, (height, width))
    source, where_labels = open_file(label_file)
    if data_set.label_columns is None:
        labels = read_idx(source, where_labels, UINT8, ())
    else:
        labels = read_idx(source, where_labels, INT32, (data_set.label_columns,))[:, 0]
    if len(images) != len(labels):
        raise DataError(f"{where_images} holds {len(images)} images but {where_labels} {len(labels)} labels")
    first, last = data_set.first_label, data_set.first_label + data_set.num_classes - 1
    low, high = int(labels.min()), int(labels.max())
    if low < first or high > last:
        raise DataError(f"{where_labels} holds labels from {low} to {high}, expected {first} .. {last}")
    if data_set.transposed:
        images = images.swapaxes(1, 2)
    return images[..., None], labels.astype(np.int32) - first


@contextlib.contextmanager
def _opener(data_set: DataSet, place: Path) -> Iterator[_Open]:
    if not place.exists():
        raise DataError(f"{place} does not exist; {_wanted(data_set)}")
    found = {name: _find(data_set, place, name) for name in data_set.file_names} if place.is_dir() else {}
    if found and all(found.values()):
        _refuse_another_sets(data_set, [path for path in found.values() if path])
        yield lambda name: (found[name] or place, str(found[name]))
        return
    archive = place / data_set.archive if data_set.archive and place.is_dir() else place
    if data_set.archive and archive.is_file():
        with open_zip(archive) as opened:
            yield lambda name: _member(data_set, opened, archive, name)
        return
    if not place.is_dir():
        raise DataError(f"{place} is no folder; {_wanted(data_set)}")
    missing = ", ".join(name for name, path in found.items() if path is None)
    raise DataError(f"{place} lacks {missing}; {_wanted(data_set)}")


def _wanted(data_set: DataSet) -> str:
    names = f"{', '.join(data_set.file_names)}, as downloaded or decompressed"
    return f"{data_set.name} takes a folder with {f'{data_set.archive}, or with ' if data_set.archive else ''}{names}"


def _find(data_set: DataSet, folder: Path, name: str) -> Path | None:
    folders = [folder, folder / data_set.archive_folder] if data_set.archive_folder else [folder]
    candidates = [place / spelled for place in folders for spelled in (name, name.removesuffix(".gz"))]
    return next((path for path in candidates if path.is_file()), None)


def _refuse_another_sets(data_set: DataSet, paths: list[Path]) -> None:
    """MNIST, KMNIST and Fashion-MNIST have the same file names and shapes; only checksums tell them apart."""
    owners = {item.sha256: other.name for other in CATALOGUE.values() for item in other.downloads}
    for path in paths:
        if path.stat().st_size > _LABELS_MOST_BYTES:
            continue  # the labels tell, and take no time to check
        owner = owners.get(hashlib.sha256(path.read_bytes()).hexdigest(), data_set.name)
        if owner != data_set.name:
            raise DataError(f"{path} is the file of {owner}, not of {data_set.name}; give {data_set.name}'s own folder")


def _member(data_set: DataSet, archive: zipfile.ZipFile, path: Path, name: str) -> tuple[bytes, str]:
    return read_zip_member(archive, path, f"{data_set.archive_folder}/{name}"), f"{name} in {path}"
