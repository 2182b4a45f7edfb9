"""Which key each random number of a run comes from: as it was when the recorded results were made."""

import jax
import numpy as np
import pytest

from pspinal_jax.training import keys


def folded(*numbers):
    """The key of seed `numbers[0]`, with the others folded in one after the other."""
    key = jax.random.key(numbers[0])
    for number in numbers[1:]:
        key = jax.random.fold_in(key, number)
    return key


def assert_same(found, expected):
    np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(expected))


@pytest.mark.parametrize("seed", [0, 9])
def test_keys_are_the_seed_with_what_they_are_for_folded_in(seed):
    assert_same(keys.init_key(seed), folded(seed, 0))
    assert_same(keys.step_key(seed, 5), folded(seed, 1, 5))
    assert_same(keys.augment_key(keys.step_key(seed, 5)), folded(seed, 1, 5, 2**20))
    assert_same(keys.mix_key(keys.step_key(seed, 5)), folded(seed, 1, 5, 2**20 + 1))
    np.testing.assert_array_equal(keys.epoch_order(seed, 4, 30), jax.random.permutation(folded(seed, 2, 4), 30))


def test_keys_have_the_bits_that_they_had():
    """Written down once: another way to fold, or another kind of key, would change every run."""
    found = [keys.init_key(3), keys.augment_key(keys.step_key(3, 2)), keys.mix_key(keys.step_key(3, 2))]
    assert [jax.random.key_data(key).tolist() for key in found] == [
        [3716834203, 3481239269],
        [3187666138, 3174730405],
        [2905502561, 812262410],
    ]
    assert keys.epoch_order(3, 1, 8).tolist() == [2, 4, 1, 3, 7, 0, 6, 5]
