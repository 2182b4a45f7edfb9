"""Images of any format, mode and orientation are seen as Pillow shows them, or refused; damaged ones never crash."""

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pspinal_jax.data.images.decode import decode
from pspinal_jax.errors import DataError

pytestmark = pytest.mark.slow

MODES = {
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "WEBP": ("L", "RGB", "RGBA", "LA"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "PNG": ("1", "L", "P", "RGB", "RGBA", "LA", "I;16"),
}
OPTIONS = {
    "TIFF": st.sampled_from([{}, *({"compression": name} for name in ("tiff_lzw", "tiff_deflate", "packbits"))]),
    "GIF": st.sampled_from([{}, {"interlace": 0}, {"transparency": 3}]),
    "WEBP": st.sampled_from([{"lossless": True}, {"quality": 30}, {"quality": 90, "method": 0}]),
    "JPEG": st.sampled_from([{}, {"quality": 20}, {"progressive": True}, {"subsampling": 0, "quality": 100}]),
    "PNG": st.sampled_from([{}, {"compress_level": 0}, {"optimize": True}]),
}
NO_RANGE = ("I", "F")
"""Modes of which nobody knows what is white."""


def cases(count):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


@st.composite
def pictures(draw):
    """(format, mode, pixels as Pillow wrote them, the file)."""
    kind = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[kind]))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 2**16, (height, width)).astype(np.uint16))
    elif mode in NO_RANGE:
        image = Image.fromarray(rng.integers(0, 255, (height, width)).astype(np.int32 if mode == "I" else np.float32))
    elif mode == "LAB":
        image = Image.frombytes("LAB", (width, height), rng.bytes(3 * height * width))
    elif mode in ("RGBA", "LA"):
        channels = len(mode)
        image = Image.frombytes(mode, (width, height), rng.bytes(channels * height * width))
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    exif = Image.Exif()
    # Libtiff writes no orientation that does not exist.
    orientation = draw(st.sampled_from([None, *(range(1, 9) if kind == "TIFF" else range(10))]))
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    frames = {"save_all": True, "append_images": [image]} if kind == "GIF" and draw(st.booleans()) else {}
    image.save(file, kind, exif=exif, **draw(OPTIONS[kind]), **frames)
    return kind, mode, file.getvalue()


def as_pillow_shows_it(file):
    """uint8 [H, W, 3] by Pillow's own means: upright, over white, and of 16 bits the upper 8."""
    with Image.open(io.BytesIO(file)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if image.has_transparency_data:
            seen = image.convert("RGBA")
            white = Image.new("RGBA", seen.size, "white")
            image = Image.alpha_composite(white, seen)
        return np.asarray(image.convert("RGB"))


@cases(2000)
@given(picture=pictures())
def test_any_image_is_as_pillow_shows_it_or_refused(picture):
    _, mode, file = picture
    if mode in NO_RANGE:
        with pytest.raises(DataError, match="no known range"):
            decode(file, (8, 8))
        return
    expected = as_pillow_shows_it(file)
    np.testing.assert_array_equal(decode(file, expected.shape[:2]), expected)


@cases(1500)
@given(
    picture=pictures(),
    position=st.floats(0, 1),
    how=st.sampled_from(["cut", "flip", "overwrite", "repeat"]),
    content=st.binary(min_size=1, max_size=8),
)
def test_a_damaged_image_is_an_image_or_one_line(picture, position, how, content):
    file = bytearray(picture[-1])
    at = int(position * (len(file) - 1))
    if how == "cut":
        del file[at:]
    elif how == "flip":
        file[at] ^= content[0] or 1
    elif how == "overwrite":
        file[at : at + len(content)] = content
    else:
        file[at:at] = file[:at]
    try:
        assert decode(bytes(file), (8, 8)).shape == (8, 8, 3)
    except DataError as error:
        assert "\n" not in str(error)
