"""Reading what torch.save wrote, without PyTorch and without unpickling.

Two formats: a zip archive (PyTorch 1.6 and later) with one pickle and a member for each storage, and the older one:
pickles of a magic number, the protocol, the system, the object and the storages' keys, then each storage's length and
numbers.
"""

import mmap
import struct
import zipfile
from pathlib import Path
from typing import Any

from pspinal_jax.errors import DataError
from pspinal_jax.weights.layout import told
from pspinal_jax.weights.torch_pickle import Machine, Refused, Storage

_ZIP = b"PK\x03\x04"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What an older file begins with."""
_LONGEST_REASON = 200


class _Damaged(Exception):
    """The file is not as torch.save writes it."""


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
    except Refused as error:
        raise DataError(
            f"weights: {path} is damaged or holds pickled objects beside tensors ({error}), and is not read, because "
            "unpickling can run any code; where you trust it, re-save it as a state dict: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    except _Damaged as error:
        raise DataError(f"weights: {path} is damaged: {error}; fetch or save it again") from error
    except Exception as error:  # a damaged file may raise anything
        why = (str(error).splitlines() or [type(error).__name__])[0][:_LONGEST_REASON]
        raise DataError(f"weights: {path} is no readable PyTorch file ({why}); save it again") from error


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
            raise Refused("a TorchScript program")
        order = archive.read(f"{top}byteorder") if f"{top}byteorder" in members else b"little"
        if order != b"little":
            raise ValueError("its numbers are not in little-endian order")
        pickled = archive.read(f"{top}data.pkl")
    machine = Machine()
    held = machine.run(pickled)
    view = memoryview(content)
    for key, storage in machine.storages.items():
        entry = members.get(f"{top}data/{key}")
        if entry is None:
            raise _Damaged(f"it has no member {told(f'{top}data/{key}')}")
        lengths = struct.unpack("<HH", content[entry.header_offset + 26 : entry.header_offset + 30])
        start = entry.header_offset + 30 + sum(lengths)
        _locate(storage, view[start : start + entry.file_size])
    return held


def _check_members(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse what torch.save never writes, before anything is unpacked, and compare the checksums."""
    if len(archive.infolist()) != len(entries):
        raise _Damaged("two members have the same name")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise _Damaged(f"{told(entry.filename)} is compressed, which PyTorch's files never are")
    if sum(entry.file_size for entry in entries) > size:
        raise _Damaged("its members overlap")
    bad = archive.testzip()
    if bad is not None:
        raise _Damaged(f"{told(bad)} is not what was saved")


def _read_older(content: mmap.mmap) -> Any:
    if Machine().run(content) != _MAGIC:
        raise ValueError("it does not begin as one")
    protocol, system = Machine().run(content), Machine().run(content)
    if protocol != _PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its protocol is not known, or its numbers are not in little-endian order")
    machine = Machine()
    held, keys = machine.run(content), Machine().run(content)
    storages = machine.storages
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    view, start = memoryview(content), content.tell()
    for key in keys:
        (count,) = struct.unpack("<q", view[start : start + 8])
        storage = storages[key]
        if count != storage.count:
            raise ValueError("a storage has another length than its tensors say")
        start += 8
        _locate(storage, view[start : start + storage.nbytes])
        start += storage.nbytes
    if start != len(content):
        raise ValueError("it goes on after its last storage")
    return held


def _locate(storage: Storage, data: memoryview) -> None:
    """Give `storage` its numbers."""
    if len(data) != storage.nbytes:
        raise ValueError("a storage has another length than its tensors say")
    storage.data = data
