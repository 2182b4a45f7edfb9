import numpy as np
import pytest

from pspinal_jax.data.dataset import hold_out, split_by_class
from pspinal_jax.errors import UsageError


def test_validation_and_train_part_the_examples():
    train, validation = hold_out(100, 30, seed=1)
    assert len(validation) == 30
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(100))


def test_the_split_depends_on_its_seed_alone():
    np.testing.assert_array_equal(hold_out(100, 30, 1)[1], hold_out(100, 30, 1)[1])
    assert set(hold_out(100, 30, 1)[1]) != set(hold_out(100, 30, 2)[1])


def test_something_must_be_left_to_train_on():
    with pytest.raises(UsageError, match="num_validation is 100"):
        hold_out(100, 100, 0)


def test_every_class_draws_from_a_generator_of_its_own():
    labels = np.arange(60) % 3
    rest, drawn = split_by_class(labels, 0.3, seed=7)
    assert np.bincount(labels[drawn]).tolist() == [6, 6, 6] and sorted([*rest, *drawn]) == list(range(60))
    of_class = [drawn[labels[drawn] == label].tolist() for label in range(3)]
    expected = [np.random.default_rng([7, label]).permutation(np.arange(label, 60, 3))[:6] for label in range(3)]
    assert of_class == [sorted(each) for each in expected]
    # So class 2 draws the same where class 0 has joined class 1.
    joined = split_by_class(np.maximum(labels, 1), 0.3, seed=7)[1]
    assert joined[labels[joined] == 2].tolist() == of_class[2]
