"""The progressive head in hand-written JAX: two pure functions, plain dicts, an optax step."""

import jax
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pspinal_jax.interop.functional import progressive_head

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=360, random_state=0)

init, apply = progressive_head(num_classes=10, layer_width=32, norm="batch")
params, batch_stats = init(jax.random.key(0), num_features=64)
optimizer = optax.adam(1e-2)
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, batch_stats, opt_state, key):
    def loss_fn(params):
        logits, new_stats = apply(params, batch_stats, train_x, train=True, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, train_y).mean(), new_stats

    (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), new_stats, opt_state, loss


for step in range(60):
    params, batch_stats, opt_state, loss = train_step(params, batch_stats, opt_state, jax.random.key(step))

logits, _ = apply(params, batch_stats, test_x, train=False)
print(f"loss {loss:.3f}, test accuracy {(logits.argmax(-1) == test_y).mean():.3f}")
