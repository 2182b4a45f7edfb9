"""Images are seen as they are, or refused with the reason; what is left out is said."""

import io
import os
import struct
import sys

import numpy as np
import pytest
from PIL import Image, features

from pspinal_jax.data.folder import check_files, read_folder
from pspinal_jax.data.images.decode import decode
from pspinal_jax.errors import DataError

RAMP = np.tile(np.linspace(0, 255, 32).round().astype(np.uint8), (32, 1))
LAID = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
TAKEN = {
    "1": ("PNG", "TIFF", "BMP"),
    "L": ("PNG", "TIFF", "BMP", "GIF", "JPEG", "PPM", "JPEG2000"),
    "P": ("PNG", "TIFF", "BMP", "GIF"),
    "RGB": ("PNG", "TIFF", "BMP", "JPEG", "WEBP", "PPM", "JPEG2000"),
    "RGBA": ("PNG", "TIFF", "WEBP"),
    "LA": ("PNG", "TIFF"),
    "CMYK": ("TIFF", "JPEG"),
    "YCbCr": ("TIFF", "JPEG"),
    "I;16": ("PNG", "TIFF", "JPEG2000"),
}
"""Mode as Pillow writes it -> formats; every other mode of grey or colour is refused, see the tests below."""


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values, bits, photometric, sample_format=1):
    """A grey TIFF of one strip; photometric 0 has white as 0."""
    height, width = values.shape
    if bits == 12:  # two levels in three bytes, the upper bits first
        first, second = values.reshape(-1, 2).T
        content = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    else:
        content = values.astype(f"<u{bits // 8}").tobytes()
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, len(content)), (339, 3, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("value", [1, *LAID])
def test_an_orientation_is_applied_once(kind, value):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    pixels = np.zeros((24, 16, 3), np.uint8)
    pixels[:12, :8], pixels[:12, 8:], pixels[12:, :8] = (250, 20, 20), (20, 250, 20), (20, 20, 250)
    upright, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = value
    lying = upright.transpose(LAID[value]) if value in LAID else upright
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    options["AVIF"]["subsampling"] = "4:4:4"
    seen = decode(encoded(lying, kind, exif=exif, **options.get(kind, {})), (24, 16)).astype(int)
    assert np.abs(seen - pixels).mean() < 2


def test_heic_is_read_where_pillow_heif_is_installed():
    """And turned by libheif alone, which goes by the file and not by EXIF (ISO/IEC 23008-12, section 6.5.10)."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    pixels, exif = np.repeat(RAMP[..., None], 3, -1), Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(pixels), "HEIF", quality=100, chroma=444, exif=exif)
    Image.OPEN.pop("HEIF")  # as in a process that has seen none yet
    assert np.abs(decode(data, (32, 32)).astype(int) - pixels).mean() < 2


def media(*brands):
    """The beginning of a file of ISO's base media format."""
    return struct.pack(">I", 8 + 4 * len(brands)) + b"ftyp" + b"".join(brands) + bytes(40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (media(b"avif", bytes(4), b"mif1"), "an AVIF image, which takes pip install 'pillow"),
        (media(b"heic", bytes(4), b"mif1"), "a HEIC image, which takes pip install pillow-heif"),
        (media(b"isom", bytes(4), b"mp41"), "it may be an AVIF image"),
        (b"\xff\xff\xff\xffftyp" + bytes(99), "it may be an AVIF image"),
    ],
)
def test_formats_that_nothing_here_reads_are_named_with_what_to_install(data, reason, monkeypatch):
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError, match=reason):
        decode(data, (32, 32))


def test_class_of_such_images_alone_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    for path in (folder / "dark").iterdir():
        path.with_suffix(".heic").write_bytes(media(b"heic", bytes(4)))
        path.unlink()
    with pytest.raises(DataError, match="dark holds no image that can be decoded"):
        read_folder(folder, strict=False, image_size=8, test_fraction=0.25, split_seed=0)
    assert "pip install pillow-heif" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "kind"), [(mode, kind) for mode, kinds in TAKEN.items() for kind in kinds])
def test_every_mode_shows_the_levels_that_it_holds(mode, kind):
    grey = Image.fromarray(RAMP)
    special = {"I;16": lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), "1": lambda: Image.fromarray(RAMP > 127)}
    # From grey, a palette is that of all greys; from colours it would be one of 216, dithered.
    image = special.get(mode, lambda: (grey if mode in ("L", "P", "LA") else grey.convert("RGB")).convert(mode))()
    expected = RAMP if mode != "1" else np.where(RAMP > 127, 255, 0)
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    seen = decode(encoded(image, kind, **options), (32, 32)).astype(int)
    assert np.abs(seen - expected[..., None]).max() <= 3


@pytest.mark.parametrize(("bits", "photometric"), [(8, 0), (8, 1), (12, 1), (16, 0), (16, 1)])
def test_levels_of_so_many_bits_are_those_of_eight_and_white_as_zero_is_white(bits, photometric):
    levels = RAMP.astype(np.int64) << (bits - 8)
    most = (1 << bits) - 1
    seen = decode(tiff(levels if photometric else most - levels, bits, photometric), (32, 32))
    np.testing.assert_array_equal(seen, np.repeat(RAMP[..., None], 3, -1))


def test_grey_levels_of_twelve_bits_keep_their_upper_eight():
    levels = np.arange(4096).reshape(64, 64)
    np.testing.assert_array_equal(decode(tiff(levels, 12, 1), (64, 64))[..., 1], levels >> 4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(RAMP.astype(np.int64) * 16843009, 32, 1), "grey levels have no known range"),
        (tiff(RAMP.astype(np.int64) * 100, 16, 1, sample_format=2), "signed or 32-bit grey levels have no known range"),
        (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floating-point pixels have no known range"),
    ],
)
def test_levels_of_unknown_range_are_refused_with_the_reason(data, reason):
    with pytest.raises(DataError, match=reason):
        decode(data, (32, 32))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 255, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def read(folder):
    return read_folder(folder, image_size=8, test_fraction=0.3, split_seed=0, strict=False)


def test_what_is_left_out_is_counted_and_named(folder, capsys):
    (folder.parent / "elsewhere").mkdir()
    (folder / "dark" / "linked").symlink_to(folder.parent / "elsewhere", target_is_directory=True)
    (folder / "dark" / "shot.dib").write_bytes(b"x")
    (folder / "dark" / ".hidden").write_bytes(b"x")
    (folder / "loose.png").write_bytes((folder / "dark" / "0.png").read_bytes())
    (folder / "light" / "broken.png").write_bytes(b"no image")
    data = read(folder)
    said = capsys.readouterr().err
    for line in (
        "left out 1 pictures beside the class folders, in no class: loose.png",
        "left out 1 linked folders inside a class: dark/linked",
        "left out 1 files in class folders with another suffix (.dib): dark/shot.dib",
        "light/broken.png (its format is not known)",
    ):
        assert line in said
        assert "broken" in line or any(line in each for each in data.passed_over)
    assert ".hidden" not in said
    assert len(data.train) + len(data.test) == 12


def test_a_folder_that_looks_like_a_split_is_named(folder, tmp_path, capsys):
    root = tmp_path / "root"
    root.mkdir()
    for name in ("train", "test", "holdout"):
        (root / name).mkdir()
        for each in ("dark", "light"):
            (root / name / each).symlink_to(folder / each, target_is_directory=True)
    read(root)
    assert "left out 1 folders beside test, train: holdout" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["written over", "moved into its place"])
def test_a_file_that_is_written_over_is_checked_again(folder, tmp_path, monkeypatch, how):
    monkeypatch.setenv("PSPINAL_JAX_CACHE", str(tmp_path / "cache"))
    assert check_files(folder, ["dark/0.png"], False)["dark/0.png"].problem is None
    image = folder / "dark" / "0.png"
    before = image.stat()
    target = image if how == "written over" else tmp_path / "other.png"
    target.write_bytes(b"x" * before.st_size)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(target, image)
    assert check_files(folder, ["dark/0.png"], False)["dark/0.png"].problem is not None
