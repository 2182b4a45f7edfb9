import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pillow_reference
import pytest

from pspinal_jax.augment import (
    Augmentation,
    apply_warp,
    augment,
    draw_warp,
    perspective_coefficients,
    rotate,
    warp_perspective,
)


def test_digits_equal_pillows_two_steps(digits):
    warp = draw_warp(jax.random.key(0), len(digits), 28, 28)
    corners, angles = np.asarray(warp.corners), np.asarray(warp.angles)
    theirs = pillow_reference.rotate(pillow_reference.perspective(digits, corners), angles)
    ours = apply_warp(digits, warp)
    share, _ = pillow_reference.differences(ours, theirs)
    assert share <= 1e-4
    # The rotation takes the nearest pixel: of two that are equally near, rounding may choose the other.
    assert (np.abs(np.asarray(ours).astype(int) - theirs) > 1).sum() <= 2
    np.testing.assert_array_equal(augment(jax.random.key(0), digits), ours)


@pytest.mark.parametrize("shape", [(33, 20, 1), (28, 28, 3)])
def test_one_pass_equals_perspective_then_rotation(resized, shape):
    images = resized(300, *shape)
    warp = draw_warp(jax.random.key(1), 300, *shape[:2], Augmentation(probability=0.8, degrees=25))
    coefficients = perspective_coefficients(warp.corners, *shape[:2])
    two_steps = np.asarray(rotate(warp_perspective(images, coefficients), warp.angles))
    share, largest = pillow_reference.differences(apply_warp(images, warp), two_steps)
    # A compiler may contract a product and a sum in one form and not in the other.
    assert share <= 1e-4
    assert largest <= 1


def test_what_the_perspective_moves_out_of_the_picture_does_not_come_back(digits):
    images = 255 - digits[:64]
    drawn = draw_warp(jax.random.key(2), 64, 28, 28, Augmentation(probability=1.0, degrees=30))
    start = np.array([[0, 0], [27, 0], [27, 27], [0, 27]])
    outward = drawn._replace(corners=2 * start - drawn.corners)
    theirs = pillow_reference.perspective(images, np.asarray(outward.corners))
    theirs = pillow_reference.rotate(theirs, np.asarray(outward.angles))
    share, largest = pillow_reference.differences(apply_warp(images, outward), theirs)
    assert share <= 2e-4
    assert largest <= 1


def test_the_key_alone_decides(digits):
    images = digits[:64]
    first = np.asarray(augment(jax.random.key(7), images))
    np.testing.assert_array_equal(augment(jax.random.key(7), images), first)
    assert (np.asarray(augment(jax.random.key(8), images)) != first).mean() > 0.1


def test_images_of_a_batch_are_augmented_differently(digits):
    results = np.asarray(augment(jax.random.key(0), np.repeat(digits[:1], 64, 0)))
    # About half are rotated only, and angles close to each other may give the same pixels.
    assert len({result.tobytes() for result in results}) > 40


def same(ours, theirs):
    # Other programs may contract other products and sums: a pixel in 100,000 may be off by a level.
    share, largest = pillow_reference.differences(ours, np.asarray(theirs))
    return share <= 1e-5 and largest <= 1


def test_a_compiled_loop_gives_what_plain_calls_give(digits):
    batches = jnp.asarray(digits[:320]).reshape(5, 64, 28, 28, 1)
    key = jax.random.key(3)

    def body(step, results):
        return results.at[step].set(augment(jax.random.fold_in(key, step), batches[step]))

    plain = np.stack([augment(jax.random.fold_in(key, step), batches[step]) for step in range(5)])
    assert same(jax.jit(lambda: jax.lax.fori_loop(0, 5, body, jnp.zeros_like(batches)))(), plain)


def test_vmap_gives_what_plain_calls_give(digits):
    batches = jnp.asarray(digits[:192]).reshape(3, 64, 28, 28, 1)
    keys = jax.random.split(jax.random.key(4), 3)
    plain = np.stack([augment(key, batch) for key, batch in zip(keys, batches, strict=True)])
    assert same(jax.vmap(augment)(keys, batches), plain)


def test_settings_reach_both_warps(digits):
    images = digits[:64]
    key = jax.random.key(0)
    for still in (Augmentation(probability=0.0, degrees=0.0), Augmentation(distortion=0.0, degrees=0.0)):
        np.testing.assert_array_equal(apply_warp(images, draw_warp(key, 64, 28, 28, still)), images)
    turning = Augmentation(probability=0.0, degrees=40.0)
    warp = draw_warp(key, 64, 28, 28, turning)
    assert np.abs(warp.angles).max() > 30
    np.testing.assert_array_equal(augment(key, images, turning), rotate(images, warp.angles))


def test_corners_and_angles_are_drawn_from_different_bits():
    warp = draw_warp(jax.random.key(0), 4000, 28, 28, Augmentation(probability=1.0))
    correlation = np.corrcoef(np.column_stack([np.asarray(warp.corners).reshape(4000, 8), warp.angles]).T)
    assert np.abs(correlation - np.eye(9)).max() < 5 / np.sqrt(4000)


def test_wrong_arguments_are_refused(digits):
    warp = draw_warp(jax.random.key(0), 3, 28, 28)
    with pytest.raises(TypeError, match="must be a uint8 array, got float32"):
        augment(jax.random.key(0), jnp.zeros((3, 28, 28, 1)))
    with pytest.raises(ValueError, match=r"corners must have shape \[3, 4, 2\]"):
        apply_warp(digits[:3], warp._replace(corners=warp.corners[:2]))
    with pytest.raises(ValueError, match=r"angles must have shape \[3\]"):
        apply_warp(digits[:3], warp._replace(angles=warp.angles[:2]))
    with pytest.raises(ValueError, match="probability must be between 0 and 1, got 2"):
        augment(jax.random.key(0), digits[:3], Augmentation(probability=2))


def test_it_imports_jax_and_numpy_only():
    code = (
        "import sys; import pspinal_jax.augment;"
        "print(sorted({'flax', 'optax', 'PIL', 'torch', 'tensorflow_datasets', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
