import jax
import jax.numpy as jnp
import numpy as np
import pillow_reference
import pytest
from PIL import Image, ImageOps

from pspinal_jax.augment import CropAugmentation, View, apply_view, draw_view, rotate_crop_flip


def reference(images, view, size):
    """What torchvision does with Pillow: rotate, crop, then mirror."""
    cropped = []
    for turned, (top, left), flip in zip(
        pillow_reference.rotate(images, view.angles), np.asarray(view.corners), np.asarray(view.flips), strict=True
    ):
        crop = Image.fromarray(turned).crop((left, top, left + size, top + size))
        cropped.append(np.asarray(ImageOps.mirror(crop) if flip else crop))
    return np.stack(cropped)


def test_images_equal_pillows(resized):
    images = resized(16, 230, 230, 3)
    view = draw_view(jax.random.key(3), 16, 230, 230, 224)
    assert 0 < np.asarray(view.flips).sum() < 16, "both kinds are there"
    assert np.abs(view.angles).max() > 10, "the angles are large enough to tell"
    share, _ = pillow_reference.differences(apply_view(images, view, 224), reference(images, view, 224))
    assert share <= 1e-5


def test_other_sizes_equal_pillows(resized):
    images = resized(40, 21, 34, 3)
    view = draw_view(jax.random.key(4), 40, 21, 34, 13)
    share, _ = pillow_reference.differences(apply_view(images, view, 13), reference(images, view, 13))
    assert share <= 1e-5


def test_draws_cover_their_ranges_evenly():
    view = draw_view(jax.random.key(0), 20_000, 230, 232, 224)
    corners = np.asarray(view.corners)
    assert corners.min(0).tolist() == [0, 0] and corners.max(0).tolist() == [6, 8]
    counts = np.bincount(corners[:, 0], minlength=7)
    assert np.abs(counts / counts.mean() - 1).max() < 0.08
    assert abs(np.asarray(view.flips).mean() - 0.5) < 0.02
    angles = np.asarray(view.angles)
    assert angles.min() < -14.9 and angles.max() > 14.9 and np.abs(angles).max() <= 15 and abs(angles.mean()) < 0.3
    # Nothing follows from anything else.
    together = np.corrcoef([angles, corners[:, 0], corners[:, 1], np.asarray(view.flips)])
    assert np.abs(together - np.eye(4)).max() < 0.03


def test_settings_that_change_nothing_change_nothing(resized):
    images = resized(3, 20, 20, 3)
    nothing = CropAugmentation(degrees=0.0, flip_probability=0.0)
    np.testing.assert_array_equal(rotate_crop_flip(jax.random.key(1), images, 20, nothing), images)


def test_the_key_decides(resized):
    images = resized(4, 24, 24, 3)
    first, again, other = (rotate_crop_flip(jax.random.key(seed), images, 20) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


def test_wrong_arguments_are_refused(resized):
    images = resized(2, 20, 20, 3)
    with pytest.raises(ValueError, match="size must be between 1 and the images' 20 x 20, got 21"):
        rotate_crop_flip(jax.random.key(0), images, 21)
    with pytest.raises(ValueError, match="flip_probability must be between 0 and 1, got 2"):
        rotate_crop_flip(jax.random.key(0), images, 20, CropAugmentation(flip_probability=2))
    with pytest.raises(TypeError, match="must be a uint8 array, got float32"):
        rotate_crop_flip(jax.random.key(0), images.astype(np.float32), 20)
    view = View(jnp.zeros(2), jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, bool))
    with pytest.raises(ValueError, match=r"corners must have shape \[2, 2\], one per image"):
        apply_view(images, view, 10)
