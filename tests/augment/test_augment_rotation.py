import jax
import numpy as np
import pillow_reference
import pytest

from pspinal_jax.augment import draw_angles, rotate
from pspinal_jax.augment.warp import MAX_SIDE


def drawn(count, degrees=10.0, seed=0):
    return np.asarray(draw_angles(jax.random.key(seed), count, degrees=degrees))


def test_digits_equal_pillows(digits):
    angles = drawn(len(digits))
    ours, theirs = rotate(digits, angles), pillow_reference.rotate(digits, angles)
    assert (theirs != digits).mean() > 0.05, "the reference changes the digits"
    share, _ = pillow_reference.differences(ours, theirs)
    assert share <= 1e-5


@pytest.mark.parametrize(
    ("shape", "degrees"),
    [((33, 20, 1), 10), ((15, 17, 1), 10), ((1, 9, 1), 10), ((230, 230, 3), 15), ((31, 31, 1), 179)],
)
def test_other_sizes_channels_and_angles_equal_pillows(resized, shape, degrees):
    count = 20 if shape[0] > 200 else 300
    images = resized(count, *shape)
    angles = drawn(count, degrees, seed=1)
    share, _ = pillow_reference.differences(rotate(images, angles), pillow_reference.rotate(images, angles))
    assert share <= 1e-5


def test_whole_turns_are_exact(digits):
    image = digits[:1]
    angles = np.float32([0, 90, 180, 270, -90, 360])
    expected = np.stack([np.rot90(image[0], turns) for turns in (0, 1, 2, 3, 3, 0)])
    np.testing.assert_array_equal(rotate(np.repeat(image, 6, 0), angles), expected)


def test_pixels_from_outside_are_black():
    turned = np.asarray(rotate(np.full((1, 28, 28, 1), 255, np.uint8), np.float32([10])))[0, :, :, 0]
    assert turned[0, 0] == turned[0, -1] == turned[-1, 0] == turned[-1, -1] == 0
    assert turned[14, 14] == 255


def test_the_longest_side_still_equals_pillows():
    column = np.arange(MAX_SIDE, dtype=np.uint32).astype(np.uint8)
    images = np.broadcast_to(column[:, None, None], (MAX_SIDE, 64, 1))[None].copy()
    for angles in (np.float32([-10]), np.float32([180.3])):
        share, _ = pillow_reference.differences(rotate(images, angles), pillow_reference.rotate(images, angles))
        # An angle's sine has 24 bits: far from the centre a position may fall across a boundary.
        assert share <= 1e-4


def test_wrong_shapes_are_refused(digits):
    with pytest.raises(ValueError, match=r"angles must have shape \[3\], one per image, got \(2,\)"):
        rotate(digits[:3], np.zeros(2, np.float32))
    with pytest.raises(TypeError, match="must be a uint8 array, got int32"):
        rotate(digits[:3].astype(np.int32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="at most 8192 pixels"):
        rotate(np.zeros((1, 8193, 1, 1), np.uint8), np.zeros(1, np.float32))
