"""A trained classifier as one file that JAX alone runs."""

from pspinal_jax.export.directory import Artifact, is_export, read_export, write_export
from pspinal_jax.export.program import PLATFORMS, export_classifier

__all__ = ["PLATFORMS", "Artifact", "export_classifier", "is_export", "read_export", "write_export"]
