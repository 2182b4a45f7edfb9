"""A vision transformer of Equimo 2 (Equinox) with the progressive head in place of its own, trained on digits.

In a checkout: pip install '.[equimo]' (Python 3.12 or newer)
"""

import equinox as eqx
import jax
import optax
from equimo.finetune import replace_head
from equimo.vision.models import VisionTransformer
from sklearn.datasets import load_digits

import pspinal_jax
from pspinal_jax.interop.equinox import ProgressiveSpinalHead

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32").reshape(-1, 1, 8, 8)  # channels first


class Head(eqx.Module):
    """As Equimo calls one: with an image's features, without a state (for batch norm) or a key (for dropout)."""

    head: ProgressiveSpinalHead

    def __call__(self, features):
        return self.head(features, None)[0]


def build(key):
    size = {"img_size": 8, "in_channels": 1, "dim": 64, "patch_size": 2, "num_heads": [4], "depths": [2]}
    head = Head(ProgressiveSpinalHead(64, num_classes=10, layer_width=32, dropout_rate=0.0, key=key))
    return replace_head(VisionTransformer(**size, key=key), head)


def init(key, images):
    return eqx.filter(build(key), eqx.is_inexact_array)


static = eqx.filter(build(jax.random.key(0)), eqx.is_inexact_array, inverse=True)


def apply(params, images, train, key):
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(images))
    model = eqx.combine(params, static)
    return jax.vmap(lambda image, key: model(image, key=key, inference=not train))(images, keys)


optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, 345))
result = pspinal_jax.fit((init, apply), (images[:1437], labels[:1437]), optimizer=optimizer, epochs=15)
print(f"test accuracy {result.evaluate(images[1437:], labels[1437:])['accuracy']:.3f}")
