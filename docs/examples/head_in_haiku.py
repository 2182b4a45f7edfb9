"""The progressive head in Haiku: a module inside hk.transform_with_state."""

from functools import partial

import haiku as hk
import jax
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pspinal_jax.interop.haiku import ProgressiveSpinalHead

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=360, random_state=0)


@hk.transform_with_state
def classifier(images, is_training):
    features = jax.nn.relu(hk.Linear(48)(images))
    return ProgressiveSpinalHead(num_classes=10, layer_width=32, norm="batch")(features, is_training)


init = jax.jit(partial(classifier.init, is_training=True))
params, state = init(jax.random.key(0), train_x)
optimizer = optax.adam(1e-2)
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, state, opt_state, key):
    def loss_fn(params):
        logits, new_state = classifier.apply(params, state, key, train_x, is_training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, train_y).mean(), new_state

    (loss, new_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), new_state, opt_state, loss


for step in range(60):
    params, state, opt_state, loss = train_step(params, state, opt_state, jax.random.key(step))

logits, _ = classifier.apply(params, state, None, test_x, is_training=False)
print(f"loss {loss:.3f}, test accuracy {(logits.argmax(-1) == test_y).mean():.3f}")
