"""The 1,797 handwritten 8x8 digits (UCI) that ship with scikit-learn."""

import numpy as np

from pspinal_jax.data.idx import Arrays

NUM_TEST = 360
_LEVELS = 16  # scikit-learn's grey levels go from 0 to 16


def read_digits() -> Arrays:
    """Splits 'train' (1,437) and 'test' (360), drawn with seed 0; images uint8 [N, 8, 8, 1]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / _LEVELS)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    parts = {"test": order[:NUM_TEST], "train": order[NUM_TEST:]}
    return {name: (images[part], labels[part]) for name, part in parts.items()}
