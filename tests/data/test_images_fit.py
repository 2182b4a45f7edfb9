"""How an image that is no square becomes one: squash, crop, pad."""

import io

import numpy as np
import pytest
from images_support import InMemory
from PIL import Image

from pspinal_jax.data.images import ImageSplit
from pspinal_jax.data.images.decode import decode

COARSE = np.random.default_rng(0).integers(0, 256, (4, 12, 3)).astype(np.uint8)
WIDE = Image.fromarray(COARSE).resize((120, 40), Image.Resampling.BICUBIC)
BILINEAR = Image.Resampling.BILINEAR


def close(ours, expected):
    assert np.abs(ours.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("upright", [False, True])
def test_crop_is_the_middle_square_and_pad_the_whole_image(upright):
    image = WIDE.transpose(Image.Transpose.ROTATE_90) if upright else WIDE
    turn = (lambda each: np.rot90(each)) if upright else np.asarray
    close(decode(image, (16, 16), "crop"), turn(np.asarray(WIDE.resize((48, 16), BILINEAR).crop((16, 0, 32, 16)))))
    padded = turn(np.zeros((30, 30, 3), np.uint8)).copy()
    inside = np.asarray(WIDE.resize((30, 10), BILINEAR))
    if upright:
        padded[:, 10:20] = np.rot90(inside)
    else:
        padded[10:20] = inside
    close(decode(image, (30, 30), "pad"), padded)
    close(decode(image, (16, 16)), turn(np.asarray(WIDE.resize((16, 16), BILINEAR))))


def test_an_image_of_the_right_aspect_is_the_same_in_every_fit():
    square = WIDE.crop((0, 0, 40, 40))
    for fit in ("crop", "pad"):
        np.testing.assert_array_equal(decode(square, (16, 16), fit), decode(square, (16, 16)))


def test_crop_and_pad_of_sides_that_do_not_divide():
    for size in ((7, 5), (5, 7), (224, 3)):
        assert decode(WIDE, size, "crop").shape == decode(WIDE, size, "pad").shape == (*size, 3)
    thin = Image.new("RGB", (2000, 1), "white")
    assert decode(thin, (8, 8), "pad").any() and decode(thin, (8, 8), "crop").min() == 255


def test_a_crop_may_lie_elsewhere_as_seeds_decide():
    whole = WIDE.resize((48, 16), BILINEAR)
    tall = WIDE.transpose(Image.Transpose.TRANSPOSE)
    for place, first in ((0.0, 0), (0.25, 8), (1.0, 32)):
        expected = np.asarray(whole.crop((first, 0, first + 16, 16)))
        close(decode(WIDE, (16, 16), "crop", place), expected)
        close(decode(tall, (16, 16), "crop", place), expected.swapaxes(0, 1))
    file = io.BytesIO()
    WIDE.save(file, "PNG")
    split = ImageSplit(InMemory([file.getvalue()] * 3), np.arange(3), "crop")
    moved, again, later = split.random_crop(5, 1), split.random_crop(5, 1), split.random_crop(5, 2)
    pictures = [[each.read(index, (16, 16)) for index in range(3)] for each in (moved, again, later)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (np.array(pictures[0]) != np.array(pictures[2])).any()
    taken = moved.take(np.array([2, 0])).take(np.array([1]))
    np.testing.assert_array_equal(taken.read(0, (16, 16)), pictures[0][0])
    assert (pictures[0][0] != pictures[0][1]).any()
    squashed = ImageSplit(split.encoded, split.labels)
    assert squashed.random_crop(1) is squashed


def test_a_large_jpeg_is_decoded_at_a_fraction_and_cropped_where_it_should_be():
    large = WIDE.resize((1920, 640), BILINEAR)
    file = io.BytesIO()
    large.save(file, "JPEG", quality=95)
    expected = np.asarray(large.crop((640, 0, 1280, 640)).resize((32, 32), BILINEAR)).astype(int)
    ours = decode(file.getvalue(), (32, 32), "crop")
    assert np.abs(ours - expected).mean() < 2


def test_a_split_reads_as_it_fits_whatever_is_taken_of_it_and_its_checksum_tells():
    file = io.BytesIO()
    WIDE.save(file, "PNG")
    split = ImageSplit(InMemory([file.getvalue()] * 2), np.zeros(2, np.int32), "crop")
    for each in (split, split.take(np.array([1])), split.take(np.array([1])).take(np.array([0])), split.join(split)):
        np.testing.assert_array_equal(each.read(0, (16, 16)), decode(WIDE, (16, 16), "crop"))
    checksums = {
        ImageSplit(split.encoded, split.labels, fit).checksum(None, split, ("a",)) for fit in ("squash", "crop", "pad")
    }
    assert len(checksums) == 3
