"""A ResNet written in nnx, as in Bonsai, with the progressive head as its classifier, trained on digits.

In a checkout: pip install .
"""

import optax
from flax import nnx
from sklearn.datasets import load_digits

import pspinal_jax
from pspinal_jax.interop.nnx import ProgressiveSpinalHead

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)


class Block(nnx.Module):
    def __init__(self, inputs, outputs, stride, *, rngs):
        self.first = nnx.Conv(inputs, outputs, (3, 3), stride, use_bias=False, rngs=rngs)
        self.second = nnx.Conv(outputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.shortcut = nnx.Conv(inputs, outputs, (1, 1), stride, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(outputs, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        hidden = self.norms[1](self.second(nnx.relu(self.norms[0](self.first(x)))))
        return nnx.relu(hidden + self.norms[2](self.shortcut(x)))


class ResNet(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.blocks = nnx.List([Block(1, 16, 1, rngs=rngs), Block(16, 32, 2, rngs=rngs), Block(32, 64, 2, rngs=rngs)])
        self.head = ProgressiveSpinalHead(64, num_classes, layer_width=32, norm="batch", rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


result = pspinal_jax.fit(
    ResNet(10, rngs=nnx.Rngs(0)), (images[:1437], labels[:1437]), optimizer=optax.adam(2e-3), epochs=8
)
print(f"test accuracy {result.evaluate(images[1437:], labels[1437:])['accuracy']:.3f}")
