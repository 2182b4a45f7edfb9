import jax
import numpy as np
import pytest

from pspinal_jax.augment import draw_angles, draw_perspective

INWARD = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])


def offsets(count, height, width, **settings):
    corners = np.asarray(draw_perspective(jax.random.key(3), count, height, width, **settings))
    right, bottom = width - 1, height - 1
    start = np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]])
    assert corners.dtype == np.int32
    return (corners - start) * INWARD


def test_corner_offsets_are_uniform_from_0_to_half_of_half_a_side_inclusive():
    drawn = offsets(16_000, 28, 28, probability=1.0)
    for corner in range(4):
        for axis in range(2):
            counts = np.bincount(drawn[:, corner, axis], minlength=8)
            assert counts.shape == (8,)
            # Chi-squared with 7 degrees of freedom: 29.9 is passed once in 10,000 draws, and the key is fixed.
            assert ((counts - 2000) ** 2 / 2000).sum() < 29.9


def test_the_eight_offsets_are_independent():
    drawn = offsets(16_000, 28, 28, probability=1.0).reshape(16_000, 8)
    correlation = np.corrcoef(drawn.T)
    assert np.abs(correlation - np.eye(8)).max() < 5 / np.sqrt(16_000)


@pytest.mark.parametrize(
    ("height", "width", "distortion", "furthest"),
    [
        (28, 28, 0.5, (7, 7)),
        (20, 33, 0.5, (8, 5)),
        (27, 9, 0.3, (1, 3)),
        (3, 2, 0.5, (0, 0)),
        (28, 28, 1.0, (14, 14)),
        (28, 28, 0.0, (0, 0)),
    ],
)
def test_the_furthest_offset_follows_each_side(height, width, distortion, furthest):
    drawn = offsets(2000, height, width, distortion=distortion, probability=1.0)
    assert drawn.min() == 0
    assert tuple(drawn.max((0, 1))) == furthest


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_an_image_is_warped_with_the_probability_asked_for(probability):
    moved = (offsets(16_000, 28, 28, probability=probability) != 0).any((1, 2)).mean()
    assert abs(moved - probability) <= 5 * np.sqrt(probability * (1 - probability) / 16_000)


def test_the_default_probability_is_one_half():
    moved = (offsets(16_000, 28, 28) != 0).any((1, 2)).mean()
    assert abs(moved - 0.5) < 5 * 0.5 / np.sqrt(16_000)


def test_angles_are_uniform_in_plus_minus_degrees():
    angles = np.asarray(draw_angles(jax.random.key(5), 16_000))
    assert angles.dtype == np.float32
    assert angles.min() >= -10 and angles.max() <= 10
    counts, _ = np.histogram(angles, 16, (-10, 10))
    # Chi-squared with 15 degrees of freedom: 44.3 is passed once in 10,000 draws.
    assert ((counts - 1000) ** 2 / 1000).sum() < 44.3
    wide = np.asarray(draw_angles(jax.random.key(5), 16_000, degrees=30.0))
    assert -30 <= wide.min() < -29.9 and 29.9 < wide.max() <= 30
    assert not np.asarray(draw_angles(jax.random.key(5), 10, degrees=0.0)).any()


def test_draws_are_functions_of_the_key():
    for draw in (lambda key: draw_angles(key, 64), lambda key: draw_perspective(key, 64, 28, 28)):
        first, again, other = draw(jax.random.key(0)), draw(jax.random.key(0)), draw(jax.random.key(1))
        np.testing.assert_array_equal(first, again)
        np.testing.assert_array_equal(first, jax.jit(draw)(jax.random.key(0)))
        assert (first != other).any()


@pytest.mark.parametrize("setting", [{"distortion": 1.5}, {"distortion": -0.1}, {"probability": 2.0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be between 0 and 1, got"):
        draw_perspective(jax.random.key(0), 4, 28, 28, **setting)


def test_negative_degrees_are_refused():
    with pytest.raises(ValueError, match="degrees must be at least 0, got -1"):
        draw_angles(jax.random.key(0), 4, degrees=-1)
