"""The heads: from features [..., D] to logits [..., C]. Only jax and flax are imported."""

from pspinal_jax.heads.baselines import DenseHead, MLPHead, SpinalHead
from pspinal_jax.heads.fused import fuse_params, unfuse_params
from pspinal_jax.heads.progressive import ProgressiveSpinalHead
from pspinal_jax.heads.scan import pack_batch_stats, pack_params, unpack_batch_stats, unpack_params

__all__ = [
    "DenseHead",
    "MLPHead",
    "ProgressiveSpinalHead",
    "SpinalHead",
    "fuse_params",
    "pack_batch_stats",
    "pack_params",
    "unfuse_params",
    "unpack_batch_stats",
    "unpack_params",
]
