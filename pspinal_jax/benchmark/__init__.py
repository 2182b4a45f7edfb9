"""Benchmarks: registry.py names them; each module measures alternatives side by side, ours beside PyTorch's."""
