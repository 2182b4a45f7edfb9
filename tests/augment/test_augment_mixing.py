"""Mixup and cutmix against their papers' formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspinal_jax.augment import mix, mixing
from pspinal_jax.augment.mixing import blend, cut

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 8, 10, 3)).astype(np.uint8)
FEATURES = RNG.normal(size=(6, 5)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 5], np.int32)  # so that labels tell who was mixed with whom


@pytest.mark.parametrize("inputs", [IMAGES, FEATURES], ids=["images", "features"])
def test_mixup_is_a_convex_combination(inputs):
    mixed, targets = mix(jax.random.key(3), inputs, LABELS, mixup=1.0)
    share, others = np.asarray(targets.lam), np.asarray(targets.others)
    assert np.ptp(share) == 0 and 0 < share[0] < 1 and sorted(others) == LABELS.tolist()
    expected = share[0] * inputs.astype(np.float64) + (1 - share[0]) * inputs[others]
    expected = np.rint(expected) if inputs.dtype == np.uint8 else expected
    assert mixed.dtype == inputs.dtype
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(targets.main, LABELS if share[0] >= 0.5 else others)


def test_cutmix_pastes_one_box_and_counts_its_area():
    seen = set()
    for number in range(20):
        mixed, targets = mix(jax.random.key(number), IMAGES, LABELS, cutmix=1.0)
        partners = IMAGES[np.asarray(targets.others)]
        pasted = (np.asarray(mixed) == partners).all(-1) & ~(np.asarray(mixed) == IMAGES).all(-1)
        different = ~(partners == IMAGES).all(-1)
        rows, columns = pasted.any((0, 2)), pasted.any((0, 1))
        box = np.outer(rows, columns)
        for edge in (rows, columns):
            assert np.flatnonzero(np.diff(edge.astype(int))).size <= 2  # without a gap
        np.testing.assert_array_equal(pasted, box & different)
        np.testing.assert_allclose(targets.lam, 1 - box.mean(), rtol=1e-6)
        seen.add(int(box.sum()))
    assert len(seen) >= 8 and max(seen) <= 80


def test_a_box_has_the_area_that_was_drawn_unless_an_edge_cuts_it():
    """H, W sqrt(1 - s): over many draws no box is larger, and most in the middle are as large up to whole pixels."""
    images = np.zeros((1, 64, 64, 1), np.uint8)
    for number in range(30):
        key = jax.random.key(number)
        side = 64 * np.sqrt(1 - float(jax.random.beta(jax.random.split(key, 3)[0], 1.0, 1.0)))
        mixed, share = cut(key, images, images + 1, 1.0)
        rows, columns = (np.asarray(mixed)[0, ..., 0].any(axis) for axis in (1, 0))
        for edge in (rows, columns):
            whole = not edge[0] and not edge[-1] and edge.any()
            assert edge.sum() <= side and (not whole or edge.sum() > side - 3)
        assert float(share) == 1 - float(np.asarray(mixed).mean())


def test_shares_follow_the_beta_distribution():
    shares = jax.vmap(lambda key: blend(key, jnp.zeros(1), jnp.zeros(1), 0.4)[1])(
        jax.random.split(jax.random.key(0), 4000)
    )
    np.testing.assert_allclose(np.mean(shares), 0.5, atol=0.02)
    np.testing.assert_allclose(np.var(shares), 1 / (4 * (2 * 0.4 + 1)), rtol=0.05)  # of Beta(a, a)


def test_with_both_each_batch_takes_one_with_even_chances(monkeypatch):
    """Methods that only leave their key and a mark stand for the two."""
    for number, name in enumerate(("blend", "cut"), 1):
        stub = lambda key, x, others, alpha, n=number: (0 * x + jax.random.uniform(key), n * alpha)  # noqa: E731
        monkeypatch.setattr(mixing, name, stub)
    images, labels = jnp.zeros((6, 2, 2, 1)), jnp.asarray(LABELS)
    keys = jax.random.split(jax.random.key(0), 400)
    mixed, targets = jax.vmap(lambda key: mix(key, images, labels, mixup=0.25, cutmix=0.375))(keys)
    draws = np.asarray(jax.vmap(lambda key: jax.vmap(jax.random.uniform)(jax.random.split(key, 4)))(keys))
    pasted = draws[:, 3] < 0.5
    assert 160 < pasted.sum() < 240
    np.testing.assert_array_equal(targets.lam, np.where(pasted, 0.75, 0.25)[:, None] + np.zeros(6))
    np.testing.assert_array_equal(mixed[:, 0, 0, 0, 0], np.where(pasted, draws[:, 2], draws[:, 1]))


def test_it_is_a_function_of_the_key_in_a_call_under_jit_and_vmap():
    keys = jax.random.split(jax.random.key(1), 3)
    both = lambda key: mix(key, jnp.asarray(IMAGES), jnp.asarray(LABELS), mixup=0.2, cutmix=1.0)  # noqa: E731
    mapped = jax.jit(jax.vmap(both))(keys)
    for index, key in enumerate(keys):
        for ours, theirs in zip(jax.tree.leaves(both(key)), jax.tree.leaves(mapped), strict=True):
            np.testing.assert_allclose(ours, theirs[index], rtol=1e-6, atol=1 if ours.dtype == np.uint8 else 1e-6)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (IMAGES, {}, "one of them above"),
        (IMAGES, {"mixup": -1.0, "cutmix": 2.0}, "at least 0"),
        (FEATURES, {"cutmix": 1.0}, r"cutmix takes images"),
    ],
)
def test_what_cannot_be_mixed_is_refused(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        mix(jax.random.key(0), inputs, LABELS, **options)
