"""Images: folders and prepared records of them, encoded, and a stream of decoded batches. Imports no JAX."""

from pspinal_jax.data.images.encoded import Encoded, ImageSplit

__all__ = ["Encoded", "ImageSplit"]
