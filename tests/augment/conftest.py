from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist.npz"


def _resized(images, height, width):
    images = [Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="session")
def digits():
    """2,000 real digits, uint8 [2000, 28, 28, 1]: MNIST where it is at hand, else scikit-learn's made like it."""
    if MNIST.exists():
        with np.load(MNIST) as data:
            return data["train_images"][:2000, :, :, None]
    from sklearn.datasets import load_digits

    # MNIST's own proportions: strokes of full brightness, 20x20 pixels within 28x28.
    small = np.clip(np.resize(load_digits().images, (2000, 8, 8)) * 32, 0, 255).astype(np.uint8)
    return np.pad(_resized(small, 20, 20), ((0, 0), (4, 4), (4, 4)))[..., None]


@pytest.fixture(scope="session")
def resized(digits):
    """A function (count, height, width, channels) -> real digits of that size, another digit in each channel."""

    def make(count, height, width, channels):
        images = _resized(digits[: count * channels, :, :, 0], height, width)
        return np.ascontiguousarray(images.reshape(channels, count, height, width).transpose(1, 2, 3, 0))

    return make
