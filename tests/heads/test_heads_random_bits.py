"""The bits behind the masks: JAX's own generator, in streams that have nothing to do with each other."""

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from pspinal_jax.layers.dropout import dropout_scale, random_words, threefry_2x32


def test_threefry_equals_jax():
    key = jax.random.key_data(jax.random.key(7))
    counters = jax.random.bits(jax.random.key(1), (2000,), jnp.uint32)
    words = threefry_2x32(key, counters[:1000], counters[1000:])
    np.testing.assert_array_equal(np.concatenate(words), jax.extend.random.threefry_2x32(key, counters))


def test_threefry_known_answers():
    # The vectors that the algorithm's authors publish for threefry2x32 with 20 rounds.
    for counter, key, expected in [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ]:
        first, second, key = (np.asarray(values, np.uint32) for values in (counter[:1], counter[1:], key))
        assert tuple(int(word[0]) for word in threefry_2x32(jnp.asarray(key), first, second)) == expected


def test_no_word_is_used_twice():
    key = jax.random.key(3)
    words = np.concatenate([np.ravel(random_words(key, stream, 50, 40)) for stream in range(4)])
    # 8,000 words of 2**32: the chance of any two equal is under one percent, and the key is fixed.
    assert len(np.unique(words)) == len(words)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_every_kind_of_key_works(kind):
    scale = np.asarray(dropout_scale(jax.random.key(0, impl=kind), 0, 0.25, (100, 101), jnp.float32))
    other = np.asarray(dropout_scale(jax.random.key(1, impl=kind), 0, 0.25, (100, 101), jnp.float32))
    assert set(np.unique(scale)) == {0.0, np.float32(4 / 3)}
    assert abs((scale == 0).mean() - 0.25) < 0.025
    assert 0.3 < ((scale == 0) != (other == 0)).mean() < 0.45  # 2 * 0.25 * 0.75 for independent masks


def test_old_style_keys_work():
    raw = jax.random.PRNGKey(5)
    expected = dropout_scale(jax.random.key(5), 2, 0.5, (3, 7), jnp.float32)
    np.testing.assert_array_equal(dropout_scale(raw, 2, 0.5, (3, 7), jnp.float32), expected)


def test_masks_do_not_depend_on_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(lambda key: dropout_scale(key, 0, 0.5, (4, 9), jnp.float32))(keys)
    for key, scale in zip(keys, together, strict=True):
        np.testing.assert_array_equal(scale, dropout_scale(key, 0, 0.5, (4, 9), jnp.float32))
