import gzip

import numpy as np
import pytest
from raw_files import idx

from pspinal_jax.data.raw import INT32, UINT8, read_idx
from pspinal_jax.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
LABELS = np.arange(5, dtype=np.uint8)
COLUMNS = np.array([[3, -1, 70_000, 0, 0, 0, 0, 2**31 - 1], [4, 0, 0, 0, 0, 0, 0, -(2**31)]], np.int32)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("array", "dtype"), [(IMAGES, UINT8), (LABELS, UINT8), (COLUMNS, INT32)], ids=["images", "labels", "columns"]
)
def test_what_was_written_is_read(array, dtype, compress):
    back = read_idx(compress(idx(array)), "here", dtype, array.shape[1:])
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype and back.dtype.isnative


WHOLE = idx(IMAGES)
PACKED = gzip.compress(WHOLE)
MANY = b"\0\0\x08\x03\xff\xff\xff\xff" + WHOLE[8:]  # says four billion images


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", r"begins with the bytes \(none\), expected 00 00 08 03", id="empty"),
        pytest.param(b"<!doctype html>", r"begins with the bytes 3c 21 64 6f", id="a web page"),
        pytest.param(idx(LABELS), r"begins with the bytes 00 00 08 01", id="labels"),
        pytest.param(b"\0\0\x0d\x03" + WHOLE[4:], r"00 00 0d 03, expected 00 00 08 03", id="floats"),
        pytest.param(WHOLE[:9], "and 3 sizes", id="header"),
        pytest.param(
            WHOLE[:-1], r"declares 5 items of shape \(28, 28\) \(3920 bytes\) and has 3919 bytes", id="cut short"
        ),
        pytest.param(
            MANY, r"4294967295 items of shape \(28, 28\) \(3367254359280 bytes\) and has 3920", id="count too large"
        ),
        pytest.param(WHOLE + b"\0", r"\(3920 bytes\) and has 3921 bytes", id="goes on"),
        pytest.param(idx(IMAGES[:, :27]), r"items of shape \(27, 28\) .*, expected shape \(28, 28\)", id="shape"),
        pytest.param(idx(IMAGES[:0]), "declares 0 items", id="no examples"),
        pytest.param(PACKED[:-9], "Compressed file ended", id="gzip cut in its data"),
        pytest.param(PACKED[:-1], "Compressed file ended", id="gzip cut in its checksum"),
        pytest.param(PACKED[:-8] + bytes(8), "CRC check failed", id="gzip checksum"),
        pytest.param(PACKED + b"more", "cannot be read: Not a gzipped file", id="gzip goes on"),
        pytest.param(gzip.compress(WHOLE + b"\0"), "and has 3921", id="gzip holds more"),
    ],
)
def test_whatever_is_wrong_gets_one_line_that_names_the_file(content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_idx(content, "raw/images.gz", UINT8, (28, 28))
    assert str(caught.value).startswith("raw/images.gz ") and "\n" not in str(caught.value)
