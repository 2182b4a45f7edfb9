"""The MNIST row as published, in PyTorch, from process start to its last evaluation: what `benchmark compile` times.

Run as a program, ``python -m pspinal_jax.benchmark.published MNIST.npz EPOCHS``, which prints a line of JSON an epoch.
The settings: SGD 1e-3 with momentum 0.5, batch 64, dropout 0.2, batch norm, no augmentation.
"""

import json
import sys
import time

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from pspinal_jax.benchmark.torch_reference import ImageExamples, TorchClassifier, TorchProgressiveHead

_STANDARD = (0.1307, 0.3081)


def train(arrays: dict[str, np.ndarray], epochs: int, start: float) -> None:
    """Train, and after each epoch print its number, the test accuracy in per cent and the seconds since `start`.

    Args:
      arrays: train_images uint8 [N, 28, 28], train_labels [N], test_images, test_labels.
      epochs: number of epochs; the script has 50.
      start: a time of `time.time`.
    """
    torch.manual_seed(0)
    train_loader, test_loader = (
        DataLoader(ImageExamples(arrays[f"{name}_images"], arrays[f"{name}_labels"], *_STANDARD), size, shuffle=mixed)
        for name, size, mixed in (("train", 64, True), ("test", 1000, False))
    )
    model = TorchClassifier(None, TorchProgressiveHead(784, 10, 128, batch_norm=True))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.5)
    for epoch in range(1, epochs + 1):
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test_loader)
        accuracy = 100 * correct / len(arrays["test_labels"])
        print(json.dumps({"epoch": epoch, "test": accuracy, "seconds": time.time() - start}), flush=True)


if __name__ == "__main__":
    path, epochs, start = sys.argv[1:]
    train(dict(np.load(path)), int(epochs), float(start))
