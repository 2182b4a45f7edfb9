"""Measurements: alternatives side by side in one run, against named peers."""
