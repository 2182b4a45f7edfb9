"""Layers of heads and backbones; only jax and flax are imported."""
