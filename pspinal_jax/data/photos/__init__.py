"""Photographs: folders and prepared records of encoded pictures, and a stream of decoded batches. Imports no JAX."""

from pspinal_jax.data.photos.photos import Encoded, PhotoDataset, Photos

__all__ = ["Encoded", "PhotoDataset", "Photos"]
