"""Holding validation examples out of the training split."""

import numpy as np

from pspinal_jax.errors import UsageError


def hold_out(num_examples: int, num_validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation), both sorted: `num_validation` drawn without replacement by `seed`, and the rest.

    Raises:
      UsageError: if nothing would be left to train on.
    """
    if num_validation >= num_examples:
        raise UsageError(
            f"data.num_validation is {num_validation}, but train has {num_examples} examples; choose fewer with "
            "--data.num-validation"
        )
    shuffled = np.random.default_rng(seed).permutation(num_examples)
    return np.sort(shuffled[num_validation:]), np.sort(shuffled[:num_validation])
