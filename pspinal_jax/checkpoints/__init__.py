"""Checkpoints: Orbax underneath, a checksum on top, and the newest whole one found again."""

from pspinal_jax.checkpoints.store import CheckpointStore, read_newest

__all__ = ["CheckpointStore", "read_newest"]
