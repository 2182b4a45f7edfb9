"""A vision transformer of Equimo (Equinox) with its classifier replaced by the progressive head, trained on digits.

In a checkout: pip install '.[equimo]'
"""

import argparse

import equinox as eqx
import jax
import optax
from equimo.models import VisionTransformer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pspinal_jax.interop.equinox import ProgressiveSpinalHead

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--depth", type=int, default=2, help="transformer blocks")
arguments = parser.parse_args()

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32").reshape(-1, 1, 8, 8)
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=360, random_state=0)


class Classifier(eqx.Module):
    backbone: VisionTransformer
    head: ProgressiveSpinalHead

    def __init__(self, key):
        backbone_key, head_key = jax.random.split(key)
        vit = VisionTransformer(
            img_size=8,
            in_channels=1,
            dim=64,
            patch_size=2,
            num_heads=[4],
            depths=[arguments.depth],
            num_classes=10,
            key=backbone_key,
        )
        # Without its classifier the model returns the pooled features of one image, [64].
        self.backbone = eqx.tree_at(lambda model: model.head, vit, eqx.nn.Identity())
        self.head = ProgressiveSpinalHead(64, num_classes=10, layer_width=32, norm="batch", key=head_key)

    def __call__(self, images, state, *, key, inference=False):
        keys = jax.random.split(key, len(images) + 1)
        features = jax.vmap(lambda image, key: self.backbone(image, key=key, inference=inference))(images, keys[1:])
        return self.head(features, state, key=keys[0], inference=inference)


model, state = eqx.nn.make_with_state(Classifier)(jax.random.key(0))
optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, arguments.steps))  # the running statistics lag a high rate
opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def train_step(model, state, opt_state, images, labels, key):
    def loss_fn(model, state):
        logits, state = model(images, state, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, state)
    updates, opt_state = optimizer.update(grads, opt_state)
    return eqx.apply_updates(model, updates), state, opt_state, loss


@eqx.filter_jit
def accuracy(model, state):
    logits, _ = model(test_x, state, key=jax.random.key(0), inference=True)
    return (logits.argmax(-1) == test_y).mean()


print(f"before: test accuracy {accuracy(model, state):.3f}")
for step in range(arguments.steps):
    key = jax.random.key(step)
    batch = jax.random.choice(key, len(train_x), (64,), replace=False)
    model, state, opt_state, loss = train_step(model, state, opt_state, train_x[batch], train_y[batch], key)
print(f"after {arguments.steps} steps: loss {loss:.3f}, test accuracy {accuracy(model, state):.3f}")
