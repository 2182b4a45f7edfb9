"""Every kind of picture comes out as the pixels that were put in."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from pspinal_jax.data.images.decode import decode
from pspinal_jax.errors import DataError

HEIGHT, WIDTH = 16, 24


def ramp(height=HEIGHT, width=WIDTH):
    """RGB whose corners all differ, smooth so that JPEG keeps it."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * y // (height - 1), 255 * x // (width - 1)
    return np.stack([red, green, 255 - (red + green) // 2], -1).astype(np.uint8)


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data, size=(HEIGHT, WIDTH)):
    result = decode(data, size)
    assert result.shape == (*size, 3) and result.dtype == np.uint8
    return result.astype(int)


def assert_close(actual, expected, most):
    assert np.abs(actual - expected.astype(int)).max() <= most


RGB = ramp()
GREY = RGB[..., 0]
OVER_WHITE = np.round(RGB * (GREY[..., None] / 255) + 255 * (1 - GREY[..., None] / 255))


def three(grey):
    return np.repeat(grey[..., None], 3, -1)


def black_or_white():
    return Image.fromarray(np.where(GREY > 100, 255, 0).astype(np.uint8)).convert("1")


def with_alpha(mode):
    return Image.fromarray(np.dstack([RGB, GREY]) if mode == "RGBA" else np.dstack([GREY, GREY]))


def palette_of_three():
    """Columns of red, green and blue."""
    picture = Image.fromarray(np.tile(np.arange(WIDTH) // 8, (HEIGHT, 1)).astype(np.uint8))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return picture


PALETTE = np.tile(np.repeat(255 * np.eye(3), 8, 0), (HEIGHT, 1, 1))
WHITE_FOR_GREEN = PALETTE.copy()
WHITE_FOR_GREEN[:, 8:16] = 255

LOSSLESS = {
    "RGB": (lambda: encoded(RGB), RGB),
    "grey": (lambda: encoded(GREY), three(GREY)),
    "black and white": (lambda: encoded(black_or_white()), three(np.where(GREY > 100, 255, 0))),
    "16-bit grey PNG": (lambda: encoded(GREY.astype(np.uint16) * 257), three(GREY)),
    "16-bit grey TIFF": (lambda: encoded(GREY.astype(np.uint16) * 256 + 255, "TIFF"), three(GREY)),
    "16-bit grey TIFF, big-endian": (lambda: encoded(GREY.astype(">u2") * 256, "TIFF"), three(GREY)),
    "grey with alpha": (
        lambda: encoded(with_alpha("LA")),
        three(np.round(GREY * (GREY / 255) + 255 * (1 - GREY / 255))),
    ),
    "RGB with alpha": (lambda: encoded(with_alpha("RGBA")), OVER_WHITE),
    "RGB with one transparent colour": (
        lambda: encoded(RGB, transparency=tuple(map(int, RGB[0, 0]))),
        np.where((np.mgrid[0:HEIGHT, 0:WIDTH].sum(0) == 0)[..., None], 255, RGB),
    ),
    "palette": (lambda: encoded(palette_of_three()), PALETTE),
    "palette with a transparent colour": (lambda: encoded(palette_of_three(), transparency=1), WHITE_FOR_GREEN),
    "palette with an alpha per colour": (
        lambda: encoded(palette_of_three(), transparency=b"\xff\x00\xff"),
        WHITE_FOR_GREEN,
    ),
    "GIF": (lambda: encoded(palette_of_three(), "GIF"), PALETTE),
    "GIF of two frames": (
        lambda: encoded(palette_of_three(), "GIF", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]),
        PALETTE,
    ),
    "BMP": (lambda: encoded(RGB, "BMP"), RGB),
    "WebP": (lambda: encoded(RGB, "WEBP", lossless=True), RGB),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_mode_becomes_the_same_picture(kind):
    make, expected = LOSSLESS[kind]
    assert_close(decoded(make()), expected, 1)


def test_jpeg_in_colour_grey_and_cmyk():
    assert_close(decoded(encoded(RGB, "JPEG", quality=100, subsampling=0)), RGB, 4)
    assert_close(decoded(encoded(GREY, "JPEG", quality=100)), three(GREY), 3)
    # Pillow writes CMYK as Adobe does, inverted.
    ink = Image.merge("CMYK", [*Image.fromarray(255 - RGB).split(), Image.new("L", (WIDTH, HEIGHT), 0)])
    data = encoded(ink, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data
    assert_close(decoded(data), RGB, 5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # Where row 0 and column 0 of what is stored belong, by the EXIF standard.
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB),
        7: RGB.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(RGB, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_close(decoded(encoded(np.ascontiguousarray(stored), exif=exif)), RGB, 0)


def test_resizing_is_pillows_antialiased_bilinear_whatever_the_aspect():
    picture = np.random.default_rng(0).integers(0, 256, (40, 90, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((20, 30), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decoded(encoded(picture), (30, 20)), expected)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_and_stays_the_same_picture(orientation, monkeypatch):
    picture = ramp(256, 384) if orientation == 1 else np.ascontiguousarray(np.rot90(ramp(256, 384)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture, "JPEG", quality=95, exif=exif)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *rest: sizes.append(image.size) or resize(image, *rest))
    small = np.asarray(Image.fromarray(ramp(256, 384)).resize((64, 64), Image.Resampling.BILINEAR))
    assert_close(decoded(data, (64, 64)), small, 3)
    decoded(data, (65, 65))
    # Half of it is still twice the size asked for; in the second case it would not be.
    assert sizes[-2:] == [(192, 128), (384, 256)]


def corrupt_exif():
    return b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0f\x01\x02\0\xff\xff\xff\x7f\0\0\0\x7f"


def test_nothing_that_pillow_warns_of_is_heard():
    data = encoded(RGB, "JPEG", quality=100, subsampling=0, exif=corrupt_exif())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(data)) as image:
            image.getexif()
        assert heard, "this file is to make Pillow warn"
        heard.clear()
        assert_close(decoded(data), RGB, 4)
        assert not heard


BAD = {
    "nothing": (b"", "its format is not known"),
    "text": (b"this is no picture", "its format is not known"),
    "half a JPEG": (encoded(RGB, "JPEG")[:400], "truncated|broken|cannot"),
    "half a PNG": (encoded(np.random.default_rng(0).integers(0, 256, (30, 30, 3)).astype(np.uint8))[:900], "Truncated"),
    "floating point": (encoded(Image.new("F", (3, 3)), "TIFF"), "no known range"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_decoded_is_a_data_error_of_one_line(kind):
    data, message = BAD[kind]
    with pytest.raises(DataError, match=message) as caught:
        decode(data, (4, 4))
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


@pytest.mark.parametrize("pixels", [HEIGHT * WIDTH - 1, 10])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(pixels, monkeypatch):
    data = encoded(RGB)
    assert_close(decoded(data), RGB, 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    with pytest.raises(DataError, match="pixels"):
        decode(data, (4, 4))
