"""A vision transformer of jax-image-models (nnx) and the progressive head on its features, trained on digits.

In a checkout: pip install '.[jimm]'
"""

import jax
import optax
from flax import nnx
from jimm.common.sharding import NoSharding
from jimm.models.vit import VisionTransformer
from sklearn.datasets import load_digits

import pspinal_jax
from pspinal_jax.interop.nnx import ProgressiveSpinalHead

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)

size = {"img_size": 8, "patch_size": 2, "num_layers": 2, "num_heads": 4, "hidden_size": 64, "mlp_dim": 128}


class Classifier(nnx.Module):
    def __init__(self, *, rngs):
        settings = {"do_classification": False, "dropout_rate": 0.0, "sharding": NoSharding}
        self.backbone = VisionTransformer(in_channels=1, rngs=rngs, **size, **settings)
        self.head = ProgressiveSpinalHead(64, num_classes=10, layer_width=32, norm="batch", rngs=rngs)

    def __call__(self, images):
        return self.head(self.backbone(images))


# jax-image-models works in the context of a mesh alone; `fit` then trains on the same one.
mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, 345))
with jax.set_mesh(mesh):
    model, train = Classifier(rngs=nnx.Rngs(0)), (images[:1437], labels[:1437])
    result = pspinal_jax.fit(model, train, optimizer=optimizer, epochs=15, mesh=mesh)
    accuracy = result.evaluate(images[1437:], labels[1437:])["accuracy"]
print(f"test accuracy {accuracy:.3f}")
