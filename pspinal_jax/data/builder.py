"""The TFDS builder of every set in the catalogue: it writes checked arrays as array_record, without TensorFlow."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from pspinal_jax.data.catalogue import DataSet
from pspinal_jax.data.raw import Arrays

OUR_VERSION = "1.0.0"


def make_builder(
    data_set: DataSet, data_dir: Path, splits: Arrays, on_example: Callable[[], object] = lambda: None
) -> Any:
    """A builder that prepares `data_set` from `splits` in `data_dir`/NAME/OUR_VERSION.

    Args:
      data_set: gives name, shape, class names.
      data_dir: TFDS data folder.
      splits: split -> (images uint8 [N, H, W, 1], labels [N]); none may be empty.
      on_example: called after each example.
    """

    # TFDS takes a data set's name from the builder's class, hence a class per set. It stays out of TFDS's registry,
    # where mnist and others already are.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = data_set.name
        # Not the numbers of TFDS's own versions, so that the two can lie side by side.
        VERSION = tfds.core.Version(OUR_VERSION)
        RELEASE_NOTES = {OUR_VERSION: "First version."}

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=data_set.image_shape),
                "label": tfds.features.ClassLabel(names=list(data_set.class_names)),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=data_set.keep_order,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {name: self._generate_examples(*arrays) for name, arrays in splits.items()}

        def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": Image.fromarray(image[..., 0]), "label": int(label)}
                on_example()

    return Builder(data_dir=str(data_dir), file_format="array_record")
