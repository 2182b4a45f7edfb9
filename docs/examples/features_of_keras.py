"""A Keras model on the JAX backend, cut before its last layer: heads are compared on its features.

In a checkout: pip install '.[keras]'
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
import keras
from sklearn.datasets import load_digits

import pspinal_jax

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
known, new = slice(0, 600), slice(600, None)  # the network learns from the first, heads from the others

keras.utils.set_random_seed(0)
network = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]
)
network.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
network.fit(images[known], labels[known], epochs=5, verbose=0)

backbone = keras.Model(network.inputs, network.layers[-2].output)  # of a pretrained one: any layer's output
features = backbone.predict(images[new], verbose=0)
comparison = pspinal_jax.compare(features, labels[new], trials=2, num_seeds=2, epochs=10, progress=False)
print(comparison)
accuracy = comparison.result["methods"]["progressive"]["test_accuracy"]["mean"]
print(f"test accuracy {accuracy:.3f}")
