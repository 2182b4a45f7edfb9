"""Data: from files to a checked `Dataset`. TFDS is imported only where a TFDS data set is read."""

from pspinal_jax.data.dataset import ArraySplit, Dataset, Split
from pspinal_jax.data.load import load_data

__all__ = ["ArraySplit", "Dataset", "Split", "load_data"]
