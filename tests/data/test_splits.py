import numpy as np
import pytest

from pspinal_jax.data.dataset import hold_out
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
