"""What heads and backbones are made of. Nothing here imports more than jax and flax."""
