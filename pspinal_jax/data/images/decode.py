"""From an encoded image of any kind to RGB pixels of one size, with Pillow."""

import contextlib
import io
import re
import warnings
import zlib
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from pspinal_jax.errors import DataError

# What Pillow has to say about an odd file is nothing that a user could act on in the middle of training. A filter of
# its own and not `catch_warnings`, which is not safe where several threads decode.
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
"""Not all that Pillow reads: it hands PostScript to another program, for one."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to undo each value of EXIF's tag Orientation; 1 is upright."""
_ON_ITS_SIDE = (5, 6, 7, 8)

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO = 0
"""TIFF's tags, and the value of PhotometricInterpretation for grey images whose 0 is white."""

_PNG = b"\x89PNG\r\n\x1a\n"
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
"""Brands of files of ISO's base media format (ISO/IEC 14496-12, section 4.3)."""
_LONGEST_BRANDS = 256

_DRAFT_GAP = 2
"""A JPEG is decoded at a half, quarter or eighth of its size where that leaves this many times the wanted size.

With 2, images of 1600x1200 and 4000x3000 came to 230x230 1.8 and 3.2 times faster on one x86 core (Pillow 13.0.0),
and no value differed by more than 6 of 255 (PSNR 52 and 56 dB). With 1 they gained little more (2.4 and 3.8 times) and
differed by up to 15 (46 and 49 dB).
"""


def decode(
    data: bytes | Image.Image,
    size: tuple[int, int],
    resize_mode: Literal["squash", "crop", "pad"] = "squash",
    centering: float = 0.5,
) -> np.ndarray:
    """The image in `data` as RGB, resized to `size`.

    JPEG, PNG, BMP, GIF, TIFF, WebP, PPM and JPEG 2000 in any mode: grey, 16-bit grey (its upper 8 bits), palette, CMYK;
    AVIF where Pillow has it, and HEIC where pillow-heif is installed.
    What is transparent is laid over white; EXIF's orientation is applied; of several frames the first is taken.
    Resizing is Pillow's bilinear, antialiased, as torchvision's Resize does it to PIL images. A JPEG at least four
    times as large as wanted in both directions is first decoded at a half, quarter or eighth of its size; what that
    changes stands at `_DRAFT_GAP`.

    Args:
      data: an encoded image, or one that Pillow has opened or made, which stays as it is.
      size: (H, W).
      resize_mode: what to do with another aspect than that of `size`. squash: the aspect is not kept; crop: the largest
        part that has the aspect is taken; pad: the whole image stands in the middle between black bars.
      centering: where that part lies: 0 at the left or top, 0.5 in the middle, 1 at the right or bottom.

    Returns:
      uint8 [H, W, 3].

    Raises:
      DataError: if the image cannot be decoded, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    try:
        return _decode(data, size, resize_mode, centering)
    except UnidentifiedImageError as error:
        raise DataError("the image cannot be decoded: its format is not known") from error
    except Exception as error:  # Pillow raises many kinds on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the image cannot be decoded: {reason}") from error


def _decode(data: bytes | Image.Image, size: tuple[int, int], resize_mode: str, centering: float) -> np.ndarray:
    height, width = size
    opened = contextlib.nullcontext(_copy(data)) if isinstance(data, Image.Image) else _open(data)
    with opened as image:
        limit = Image.MAX_IMAGE_PIXELS  # Pillow itself only warns up to twice as many
        if limit is not None and image.width * image.height > limit:
            raise ValueError(f"{image.width}x{image.height} pixels are more than Pillow's limit of {limit}")
        if image.format == "TIFF":
            image.load()  # which turns it upright and forgets the tag: turned again below, it would lie wrong
        orientation = _orientation(image)
        sides = (height, width) if orientation in _ON_ITS_SIDE else (width, height)
        image.draft(None, (_DRAFT_GAP * sides[0], _DRAFT_GAP * sides[1]))  # does nothing but for JPEG
        upright = _to_rgb(image)
        if orientation in _UPRIGHT:
            upright = upright.transpose(_UPRIGHT[orientation])
        if resize_mode == "squash":
            return np.asarray(upright.resize((width, height), Image.Resampling.BILINEAR))
        return _crop(upright, width, height, centering) if resize_mode == "crop" else _pad(upright, width, height)


def _crop(image: Image.Image, width: int, height: int, centering: float) -> np.ndarray:
    """The largest part that has the aspect, resized: as the whole image resized and then cropped."""
    scale = min(image.width / width, image.height / height)
    across, down = min(scale * width, image.width), min(scale * height, image.height)
    left, top = centering * (image.width - across), centering * (image.height - down)
    box = (left, top, min(left + across, float(image.width)), min(top + down, float(image.height)))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def _pad(image: Image.Image, width: int, height: int) -> np.ndarray:
    """The whole image, resized to fit, in the middle of black."""
    scale = min(width / image.width, height / image.height)
    sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    pixels = np.zeros((height, width, 3), np.uint8)
    left, top = (width - sides[0]) // 2, (height - sides[1]) // 2
    resized = np.asarray(image.resize(sides, Image.Resampling.BILINEAR))
    pixels[top : top + sides[1], left : left + sides[0]] = resized
    return pixels


def _copy(image: Image.Image) -> Image.Image:
    """A copy that keeps its file's tags of the grey levels."""
    copied = image.copy()
    if hasattr(image, "tag_v2"):
        copied.tag_v2 = image.tag_v2  # type: ignore[attr-defined]
    return copied


def _open(data: bytes) -> Image.Image:
    if data.startswith(_PNG):
        _check_png(data)
    return Image.open(io.BytesIO(data), formats=_media_format(data) if data[4:8] == b"ftyp" else _FORMATS)


def _media_format(data: bytes) -> tuple[str, ...]:
    """Pillow's name of a format that not every installation reads; ValueError where this one does not."""
    brands = {data[at : at + 4] for at in range(8, min(int.from_bytes(data[:4]), _LONGEST_BRANDS), 4)}
    if brands & _AVIF:
        if not features.check("avif"):
            raise ValueError("it is an AVIF image, which this Pillow does not read: pip install 'pillow>=11.3'")
        return ("AVIF",)
    if brands & _HEIC:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ValueError("it is a HEIC image, which takes pillow-heif: pip install pillow-heif") from None
        register_heif_opener()
        return ("HEIF",)
    return _FORMATS


def _check_png(data: bytes) -> None:
    """Compare the checksum of each chunk (PNG 1.2, section 3.4); Pillow leaves those of pixels unread."""
    view, start, kind = memoryview(data), len(_PNG), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(view[start : start + 4]), bytes(view[start + 4 : start + 8])
        end = start + 8 + length
        if end + 4 > len(data):
            raise ValueError("the PNG is truncated")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise ValueError("the PNG is damaged: a checksum does not fit")
        start = end + 4


def _orientation(image: Image.Image) -> Any:
    try:
        exif = image.getexif()
    except Exception:  # damaged EXIF says nothing about the image
        return 1
    return exif.get(ExifTags.Base.Orientation, 1)


def _grey_levels(image: Image.Image) -> np.ndarray:
    """The upper 8 bits of more than 8. Pillow clips at 255, and inverts a TIFF whose 0 is white at 8 bits only."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    bits = bits[0] if isinstance(bits, tuple) else bits
    signed = tags.get(_SAMPLE_FORMAT, 1) not in (1, (1,))
    if bits > 16 or signed:
        kind = "signed" if signed else "32-bit"
        raise ValueError(f"{kind} grey levels have no known range; 8 and 16 bits without a sign are taken")
    levels = np.asarray(image).astype(np.int64).clip(0, (1 << bits) - 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = (1 << bits) - 1 - levels
    return (levels >> (bits - 8)).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_grey_levels(image)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    if image.mode == "RGB":
        return image  # `convert` would copy it
    return image.convert("RGB")
