"""The progressive head in Equinox: parameters are leaves, running statistics live in an eqx.nn.State."""

import equinox as eqx
import jax
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pspinal_jax.interop.equinox import ProgressiveSpinalHead

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=360, random_state=0)


class Classifier(eqx.Module):
    backbone: eqx.nn.Linear
    head: ProgressiveSpinalHead

    def __init__(self, key):
        backbone_key, head_key = jax.random.split(key)
        self.backbone = eqx.nn.Linear(64, 48, key=backbone_key)
        self.head = ProgressiveSpinalHead(48, num_classes=10, layer_width=32, norm="batch", key=head_key)

    def __call__(self, images, state, *, key=None):
        features = jax.nn.relu(jax.vmap(self.backbone)(images))  # one image at a time
        return self.head(features, state, key=key)  # the whole batch: batch norm needs it


model, state = eqx.nn.make_with_state(Classifier)(jax.random.key(0))
optimizer = optax.adam(1e-2)
opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def train_step(model, state, opt_state, images, labels, key):
    def loss_fn(model, state):
        logits, state = model(images, state, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, state)
    updates, opt_state = optimizer.update(grads, opt_state)
    return eqx.apply_updates(model, updates), state, opt_state, loss


for step in range(60):
    model, state, opt_state, loss = train_step(model, state, opt_state, train_x, train_y, jax.random.key(step))

logits, _ = eqx.filter_jit(eqx.nn.inference_mode(model))(test_x, state)
print(f"loss {loss:.3f}, test accuracy {(logits.argmax(-1) == test_y).mean():.3f}")
