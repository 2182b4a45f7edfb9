"""Files of torch.save written instruction by instruction, as PyTorch would and as it never would."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

NUMBERS = np.arange(6, dtype=np.float32)
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def tensor(shape=(2, 3), strides=(3, 1), offset=0, key="0", kind="FloatStorage", count=6, bits=b""):
    """The instructions that torch.save writes for a tensor; `bits` are those of a dict, for a negated one say."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count)
    sizes = b"".join(b"(" + b"".join(map(number, each)) + b"t" for each in (shape, strides))
    start = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    return start + b"tQ" + number(offset) + sizes + b"\x89ccollections\nOrderedDict\n)R" + bits + b"tR"


def entries(**values):
    """A pickle of a dict with these instructions as values."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."


def as_zip(pickled, storages=None, name="data.pkl"):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(f"x/{name}", pickled)
        archive.writestr("x/byteorder", "little")
        for key, array in ({"0": NUMBERS} if storages is None else storages).items():
            archive.writestr(f"x/data/{key}", array.tobytes())
    return content.getvalue()


def as_older(pickled, storages=None):
    storages = {"0": NUMBERS} if storages is None else storages
    head = b"".join(pickle.dumps(each, 2) for each in (MAGIC, 1001, SYSTEM))
    parts = [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    return head + pickled + pickle.dumps(list(storages), 2) + b"".join(parts)


FORMATS = pytest.mark.parametrize("write", [as_zip, as_older])
