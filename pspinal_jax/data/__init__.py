"""Data: from files to checked arrays in memory. TFDS is imported only where a TFDS data set is read."""

from pspinal_jax.data.dataset import Dataset, Split
from pspinal_jax.data.load import load_data, load_dataset

__all__ = ["Dataset", "Split", "load_data", "load_dataset"]
