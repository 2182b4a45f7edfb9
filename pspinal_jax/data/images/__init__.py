"""Photographs: folders and prepared records of encoded pictures, and a stream of decoded batches. Imports no JAX."""

from pspinal_jax.data.images.images import Encoded, ImageDataset, ImageSplit

__all__ = ["Encoded", "ImageDataset", "ImageSplit"]
