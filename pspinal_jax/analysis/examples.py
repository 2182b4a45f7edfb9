"""The examples that a study trains and measures on, as features."""

from pathlib import Path

import numpy as np

from pspinal_jax.analysis.gradient_study import Examples
from pspinal_jax.data.arrays import Split, make_dataset
from pspinal_jax.data.digits import read_digits
from pspinal_jax.data.npz import read_npz
from pspinal_jax.errors import DataError


def read_examples(path: Path | None, most: int, batch_size: int) -> tuple[Examples, str]:
    """At most `most` examples of each split, drawn with seed 0, and where they come from.

    Args:
      path: an .npz file, or None for scikit-learn's digits.
      most: at most so many training, and so many test examples.
      batch_size: of training; there must be that many training examples.

    Raises:
      DataError: if the file cannot be used, or holds fewer training examples than a batch.
    """
    if path is None:
        data = make_dataset(dict(read_digits()), "scikit-learn's digits", None)
    else:
        data = read_npz(path.expanduser(), None)
    (train, train_labels), (test, test_labels) = (_some(split, most) for split in (data.train, data.test))
    if len(train) < batch_size:
        raise DataError(
            f"{data.source}: {len(train)} training examples are less than a batch of {batch_size}; "
            "lower --batch-size or raise --max-examples"
        )
    return Examples(train, train_labels, test, test_labels, data.num_classes), data.source


def _some(split: Split, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, D], pixels scaled to 0 .. 1, and labels."""
    chosen = split.take(np.random.default_rng(0).permutation(len(split))[:most])
    scale = np.float32(255 if chosen.inputs.dtype == np.uint8 else 1)
    return chosen.inputs.reshape(len(chosen), -1).astype(np.float32) / scale, chosen.labels
