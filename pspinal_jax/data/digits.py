"""The 1,797 handwritten 8x8 digits that ship with scikit-learn, as a TFDS data set."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

NUM_TEST = 360
_LEVELS = 16  # scikit-learn's grey levels go from 0 to 16


class Digits(tfds.core.GeneratorBasedBuilder):
    """Optical recognition of handwritten digits (UCI), as shipped by scikit-learn; split 1,437 to 360 by seed 0."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(names=list(map(str, range(10)))),
            }
        )
        return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.round(bunch.images * (255 / _LEVELS)).astype(np.uint8)
        order = np.random.default_rng(0).permutation(len(images))
        parts = {"test": order[:NUM_TEST], "train": order[NUM_TEST:]}
        return {name: self._generate_examples(images[part], bunch.target[part]) for name, part in parts.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": Image.fromarray(image), "label": int(label)}
