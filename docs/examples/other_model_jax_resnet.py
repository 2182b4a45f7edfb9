"""ResNet-18 of jax-resnet (linen) with its classifier replaced by the progressive head, trained on digits.

In a checkout: pip install '.[jax-resnet]'
"""

import argparse

import jax
import optax
from jax_resnet import ResNet18, Sequential
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pspinal_jax import ProgressiveSpinalHead

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument(
    "--hidden-sizes", type=int, nargs=4, default=(64, 128, 256, 512), help="channels of the four stages"
)
arguments = parser.parse_args()

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32").reshape(-1, 8, 8, 1).repeat(4, axis=1).repeat(4, axis=2)  # 32 x 32
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=360, random_state=0)

# The model is a Sequential whose last layer is nn.Dense(n_classes): everything before it is the backbone.
resnet = ResNet18(n_classes=10, hidden_sizes=tuple(arguments.hidden_sizes))
backbone = Sequential(resnet.layers[:-1])
head = ProgressiveSpinalHead(num_classes=10, layer_width=64)

features, backbone_variables = backbone.init_with_output(jax.random.key(0), train_x[:1])
head_variables = head.init(jax.random.key(1), features, train=False)
params = {"backbone": backbone_variables["params"], "head": head_variables["params"]}
batch_stats = backbone_variables["batch_stats"]
optimizer = optax.adam(1e-3)
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, batch_stats, opt_state, images, labels, key):
    def loss_fn(params):
        variables = {"params": params["backbone"], "batch_stats": batch_stats}
        features, updated = backbone.apply(variables, images, mutable=["batch_stats"])  # mutable: trains
        logits = head.apply({"params": params["head"]}, features, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), batch_stats, opt_state, loss


@jax.jit
def accuracy(params, batch_stats):
    features = backbone.apply({"params": params["backbone"], "batch_stats": batch_stats}, test_x, mutable=False)
    logits = head.apply({"params": params["head"]}, features, train=False)
    return (logits.argmax(-1) == test_y).mean()


print(f"before: test accuracy {accuracy(params, batch_stats):.3f}")
for step in range(arguments.steps):
    key = jax.random.key(step)
    batch = jax.random.choice(key, len(train_x), (64,), replace=False)
    params, batch_stats, opt_state, loss = train_step(
        params, batch_stats, opt_state, train_x[batch], train_y[batch], key
    )
print(f"after {arguments.steps} steps: loss {loss:.3f}, test accuracy {accuracy(params, batch_stats):.3f}")
