"""Colour jitter against Pillow's ImageEnhance, and resized crops against Pillow's resize of the same box."""

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pspinal_jax.augment import (
    ResizedCrop,
    adjust_color,
    apply_boxes,
    color_jitter,
    draw_boxes,
    draw_color,
    resized_crop_flip,
)

RNG = np.random.default_rng(0)
COARSE = RNG.integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
IMAGES = np.stack([np.asarray(Image.fromarray(each).resize((40, 40), Image.Resampling.BICUBIC)) for each in COARSE])


@pytest.mark.parametrize("channels", [3, 1])
def test_colour_is_pillows(channels):
    images = IMAGES if channels == 3 else IMAGES[..., :1]
    factors = np.array([[0.6, 1, 1], [1, 1.4, 1], [1, 1, 0.3], [1.2, 0.8, 1.3]], np.float32)
    ours = np.asarray(adjust_color(images, factors))
    for image, row, result in zip(images, factors, ours, strict=True):
        expected = Image.fromarray(image if channels == 3 else image[..., 0])
        for enhance, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), row, strict=True
        ):
            expected = enhance(expected).enhance(float(factor))
        # Pillow truncates after each of the three, and rounds the mean grey.
        difference = result.astype(int) - np.asarray(expected).reshape(result.shape)
        assert np.abs(difference).max() <= 3 and np.abs(difference).mean() < 1.5
    assert np.abs(ours.astype(int) - images).mean() > 10


def test_colour_factors_are_uniform_about_one():
    factors = np.asarray(draw_color(jax.random.key(0), 4000, 0.4))
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    np.testing.assert_allclose(factors.mean(0), 1, atol=0.02)
    np.testing.assert_allclose(factors.std(0), 0.4 / np.sqrt(3), rtol=0.05)
    np.testing.assert_array_equal(color_jitter(jax.random.key(0), IMAGES, 0.0), IMAGES)


def test_a_box_is_pillows_resize_of_it():
    boxes = draw_boxes(jax.random.key(2), 4, ResizedCrop(min_area=0.3))._replace(flips=np.array([False, True] * 2))
    ours = np.asarray(apply_boxes(IMAGES, boxes, 44))  # enlarged, where antialiasing changes nothing
    for image, (top, left), (height, width), flip, result in zip(IMAGES, *boxes, ours, strict=True):
        box = [40 * float(each) for each in (left, top, left + width, top + height)]
        expected = Image.fromarray(image).resize((44, 44), Image.Resampling.BILINEAR, box=box)
        expected = np.asarray(expected)[:, ::-1] if flip else np.asarray(expected)
        assert np.abs(result.astype(int) - expected).max() <= 2


def test_the_whole_image_is_itself():
    whole = draw_boxes(jax.random.key(0), 4, ResizedCrop(min_area=1.0, aspect=1.0, flip_probability=0.0))
    # What is read between pixels is truncated, as Pillow does, and a position may be rounded.
    assert np.abs(np.asarray(apply_boxes(IMAGES, whole, 40)).astype(int) - IMAGES).max() <= 1


def test_boxes_have_the_areas_and_aspects_that_were_asked_for():
    corners, sides, flips = map(np.asarray, draw_boxes(jax.random.key(1), 4000, ResizedCrop(min_area=0.25)))
    area, aspect = sides.prod(1), np.log(sides[:, 1] / sides[:, 0])
    assert corners.min() >= 0 and (corners + sides).max() <= 1 + 1e-6 and sides.max() <= 1
    assert area.min() > 0.249 and np.abs(aspect).max() <= np.log(4 / 3) + 1e-5
    # Where nothing is drawn again, the area is uniform.
    small = area[area < 0.7]
    np.testing.assert_allclose(
        np.quantile(small, [0.25, 0.5, 0.75]), 0.25 + 0.45 * np.array([0.25, 0.5, 0.75]), atol=0.02
    )
    np.testing.assert_allclose([aspect.mean(), flips.mean()], [0, 0.5], atol=0.03)


def test_a_box_is_the_first_of_ten_that_fits_or_the_first_of_all_cut_to_the_image():
    key, count, aspect = jax.random.key(3), 400, 40.0  # with which most do not fit
    box_key, corner_key, flip_key = jax.random.split(key, 3)
    corners, sides, flips = map(np.asarray, draw_boxes(key, count, ResizedCrop(0.25, aspect)))
    numbers = np.asarray(jax.random.uniform(box_key, (count * 20,))).reshape(count, 10, 2)
    area, ratio = 0.25 + 0.75 * numbers[..., 0], aspect ** (2 * numbers[..., 1] - 1)
    boxes = np.sqrt(np.stack([area / ratio, area * ratio], -1))
    expected, tries = [], set()
    for tried in boxes:
        fitting = np.flatnonzero(tried.max(1) <= 1)
        expected.append(tried[fitting[0]] if len(fitting) else np.minimum(tried[0], 1))
        tries.add(fitting[0] if len(fitting) else None)
    assert {None, 0, 9} <= tries
    np.testing.assert_allclose(sides, expected, rtol=1e-4)
    places = np.asarray(jax.random.uniform(corner_key, (count, 2)))
    np.testing.assert_allclose(corners, places * (1 - sides), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(flips, np.asarray(jax.random.uniform(flip_key, (count,))) < 0.5)


def test_it_is_a_function_of_the_key():
    first = resized_crop_flip(jax.random.key(5), IMAGES, 20)
    assert first.shape == (4, 20, 20, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, jax.jit(lambda key: resized_crop_flip(key, IMAGES, 20))(jax.random.key(5)))
    assert (np.asarray(first) != np.asarray(resized_crop_flip(jax.random.key(6), IMAGES, 20))).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_color(jax.random.key(0), 2, 1.5), "strength must be between 0 and 1"),
        (lambda: adjust_color(IMAGES[..., :2], np.ones((4, 3), np.float32)), "1 or 3 channels"),
        (lambda: adjust_color(IMAGES, np.ones((4, 2), np.float32)), r"factors must have shape \[4, 3\]"),
        (lambda: draw_boxes(jax.random.key(0), 2, ResizedCrop(min_area=0.0)), "min_area must be above 0"),
        (lambda: draw_boxes(jax.random.key(0), 2, ResizedCrop(aspect=0.5)), "aspect must be at least 1"),
        (lambda: draw_boxes(jax.random.key(0), 2, ResizedCrop(flip_probability=2)), "flip_probability must be"),
        (lambda: apply_boxes(IMAGES, draw_boxes(jax.random.key(0), 3), 8), r"must have shape \[4, 2\]"),
    ],
)
def test_what_cannot_be_done_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
