import jax
import jax.numpy as jnp
import numpy as np
import pillow_reference
import pytest

from pspinal_jax.augment import draw_perspective, perspective_coefficients, warp_perspective


def warped(images, corners):
    height, width = images.shape[1:3]
    return warp_perspective(images, perspective_coefficients(jnp.asarray(corners), height, width))


def drawn(count, height, width, seed=0, **settings):
    corners = draw_perspective(jax.random.key(seed), count, height, width, probability=1.0, **settings)
    return np.asarray(corners)


def test_digits_equal_pillows(digits):
    corners = drawn(len(digits), 28, 28)
    ours, theirs = warped(digits, corners), pillow_reference.perspective(digits, corners)
    assert (theirs != digits).mean() > 0.1, "the reference changes the digits"
    share, largest = pillow_reference.differences(ours, theirs)
    assert share <= 1e-4
    assert largest <= 1


@pytest.mark.parametrize("shape", [(33, 20, 1), (7, 7, 1), (28, 28, 3), (9, 64, 4)])
def test_other_sizes_and_channels_equal_pillows(resized, shape):
    images = resized(300, *shape)
    corners = drawn(300, *shape[:2], seed=1)
    ours, theirs = warped(images, corners), pillow_reference.perspective(images, corners)
    share, largest = pillow_reference.differences(ours, theirs)
    # In small images many positions lie exactly on the border or give a whole level, and the last digit of the
    # coefficients decides: there Pillow differs from itself when they are not rounded to float32.
    precise = pillow_reference.perspective(images, corners, np.float64)
    own_share, own_largest = pillow_reference.differences(precise, theirs)
    assert share <= 1e-4 + own_share
    assert largest <= 1 or own_largest > 1


def test_the_result_is_truncated_not_rounded():
    images = np.zeros((1, 28, 28, 1), np.uint8)
    images[0, 10, 11] = 255
    # A shift by a tenth of a pixel: the lit pixel gives 229.5, its neighbour 25.5.
    coefficients = jnp.array([[1, 0, -0.1, 0, 1, 0, 0, 0, 1]], jnp.float32)
    row = np.asarray(warp_perspective(images, coefficients))[0, 10, :, 0]
    assert (row[11], row[12], row.sum()) == (229, 25, 254)


def test_edges_repeat_within_half_a_pixel_and_are_black_beyond():
    images = np.full((1, 8, 8, 1), 200, np.uint8)
    quarter = np.asarray(warp_perspective(images, jnp.array([[1, 0, -0.25, 0, 1, -0.25, 0, 0, 1]], jnp.float32)))
    assert (quarter == 200).all()
    whole = np.asarray(warp_perspective(images, jnp.array([[1, 0, -1, 0, 1, -2, 0, 0, 1]], jnp.float32)))
    assert (whole[0, :2] == 0).all() and (whole[0, :, :1] == 0).all() and (whole[0, 2:, 1:] == 200).all()


@pytest.mark.parametrize(("height", "width"), [(28, 28), (20, 33), (224, 224)])
def test_coefficients_solve_torchvisions_equations(height, width):
    corners = drawn(500, height, width, seed=2)
    ours = np.asarray(perspective_coefficients(jnp.asarray(corners), height, width))
    theirs = np.stack([pillow_reference.coefficients(each, height, width) for each in corners])
    # Per coefficient, relative to the largest of its kind: 1.2e-7 is one rounding of float32.
    error = np.abs(ours[:, :8] / ours[:, 8:] - theirs).max(0) / np.abs(theirs).max(0)
    assert error.max() < 1e-6


@pytest.mark.parametrize(("height", "width"), [(5, 5), (8, 8), (20, 33)])
def test_coefficients_take_the_corners_back_even_where_torchvisions_equations_have_no_solution(height, width):
    corners = drawn(4000, height, width, seed=3)
    coefficients = np.asarray(perspective_coefficients(jnp.asarray(corners), height, width), np.float64)
    points = np.concatenate([corners, np.ones((4000, 4, 1))], -1)
    mapped = np.einsum("nij,nkj->nki", coefficients.reshape(-1, 3, 3), points)
    right, bottom = width - 1, height - 1
    start = np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]])
    assert (mapped[..., 2] > 0).all()
    assert np.abs(mapped[..., :2] / mapped[..., 2:] - start).max() < 1e-4
    if height <= 8:
        assert (np.abs(coefficients[:, 8]) < 1e-6).any(), "such a case is among them"


def test_images_whose_corners_stay_are_untouched(digits):
    corners = draw_perspective(jax.random.key(0), 64, 28, 28, probability=0.0)
    coefficients = perspective_coefficients(corners, 28, 28)
    np.testing.assert_array_equal(coefficients, np.tile(np.eye(3).reshape(9), (64, 1)))
    np.testing.assert_array_equal(warp_perspective(digits[:64], coefficients), digits[:64])


@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 3)])
def test_images_too_small_to_move_a_corner_are_untouched(shape):
    images = np.arange(2 * shape[0] * shape[1], dtype=np.uint8).reshape(2, *shape, 1)
    np.testing.assert_array_equal(warped(images, drawn(2, *shape)), images)


def test_wrong_shapes_and_dtypes_are_refused(digits):
    good = jnp.zeros((3, 9))
    with pytest.raises(TypeError, match="must be a uint8 array, got float32"):
        warp_perspective(jnp.zeros((3, 28, 28, 1)), good)
    with pytest.raises(ValueError, match=r"must have shape \[N, H, W, C\]"):
        warp_perspective(digits[:3, :, :, 0], good)
    with pytest.raises(ValueError, match=r"none of them 0, got \(0, 28, 28, 1\)"):
        warp_perspective(digits[:0], jnp.zeros((0, 9)))
    with pytest.raises(ValueError, match=r"coefficients must have shape \[2, 9\]"):
        warp_perspective(digits[:2], good)
    with pytest.raises(ValueError, match=r"corners must have shape \[N, 4, 2\]"):
        perspective_coefficients(good, 28, 28)
    with pytest.raises(ValueError, match="at least 2x2 pixels, got 1x28"):
        perspective_coefficients(jnp.zeros((3, 4, 2)), 1, 28)
