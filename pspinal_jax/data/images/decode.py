"""From an encoded image of any kind to RGB pixels of one size, with Pillow."""

import contextlib
import io
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pspinal_jax.errors import DataError

# What Pillow has to say about an odd file is nothing that a user could act on in the middle of training. A filter of
# its own and not `catch_warnings`, which is not safe where several threads decode.
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
"""Not all that Pillow reads: it hands PostScript to another program, for one."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO = 0
"""TIFF's tags, and the value of PhotometricInterpretation for grey images whose 0 is white."""

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
    source = data if isinstance(data, Image.Image) else _open(data)
    limit = Image.MAX_IMAGE_PIXELS  # Pillow itself only warns up to twice as many
    if limit is not None and source.width * source.height > limit:
        raise ValueError(f"{source.width}x{source.height} pixels are more than Pillow's limit of {limit}")
    image = source.copy() if source is data else source
    image.draft(None, (_DRAFT_GAP * max(size), _DRAFT_GAP * max(size)))  # does nothing but for JPEG
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about the image
        ImageOps.exif_transpose(image, in_place=True)
    upright = _to_rgb(image, getattr(source, "tag_v2", {}))
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


def _open(data: bytes) -> Image.Image:
    if data[4:8] == b"ftyp":  # ISO's base media format (ISO/IEC 14496-12, section 4.3), which not every Pillow reads
        with contextlib.suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()
        Image.init()
        try:
            return Image.open(io.BytesIO(data), formats=[kind for kind in ("AVIF", "HEIF") if kind in Image.OPEN])
        except UnidentifiedImageError:
            raise ValueError(
                "it may be an AVIF image, which takes pip install 'pillow>=11.3', or a HEIC image, which takes "
                "pip install pillow-heif"
            ) from None
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.format == "PNG":  # Pillow reads pixels without comparing their checksums
        image.verify()
        return Image.open(io.BytesIO(data), formats=("PNG",))
    return image


def _to_rgb(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """`image`, of a file with TIFF's `tags`, as RGB."""
    if image.mode.startswith("I"):
        return Image.fromarray(_grey_levels(image, tags)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
    return image.convert("RGB")


def _grey_levels(image: Image.Image, tags: Mapping[int, Any]) -> np.ndarray:
    """The upper 8 bits of more than 8. Pillow clips at 255, and inverts a TIFF whose 0 is white at 8 bits only."""
    bits = int(np.ravel(tags.get(_BITS_PER_SAMPLE, 16))[0])
    if bits > 16 or np.ravel(tags.get(_SAMPLE_FORMAT, 1)).tolist() != [1]:
        raise ValueError("signed or 32-bit grey levels have no known range; 8 and 16 bits without a sign are taken")
    levels = np.asarray(image).astype(np.int64).clip(0, (1 << bits) - 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = (1 << bits) - 1 - levels
    return (levels >> (bits - 8)).astype(np.uint8)
