"""The progressive head in flax.nnx: a module as any other, inside one's own."""

import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pspinal_jax.interop.nnx import ProgressiveSpinalHead

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=360, random_state=0)


class Classifier(nnx.Module):
    def __init__(self, *, rngs):
        self.backbone = nnx.Linear(64, 48, rngs=rngs)
        self.head = ProgressiveSpinalHead(48, num_classes=10, layer_width=32, norm="batch", rngs=rngs)

    def __call__(self, images):
        return self.head(nnx.relu(self.backbone(images)))


model = Classifier(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


model.train()
for _ in range(60):
    loss = train_step(model, optimizer, train_x, train_y)

model.eval()
accuracy = (nnx.jit(lambda model, x: model(x))(model, test_x).argmax(-1) == test_y).mean()
print(f"loss {loss:.3f}, test accuracy {accuracy:.3f}")
