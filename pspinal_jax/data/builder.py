"""The TFDS builder of every set in the catalogue: it writes checked examples as array_record, without TensorFlow."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from pspinal_jax.data.catalogue import OUR_VERSION, DataSet
from pspinal_jax.data.images.encoded import Examples, Images


def make_builder(
    data_set: DataSet, data_dir: Path, examples: Examples, on_example: Callable[[], object] = lambda: None
) -> Any:
    """A builder that prepares `data_set` from `examples` in `data_dir`/NAME/OUR_VERSION.

    Args:
      data_set: gives name, shape and order.
      data_dir: TFDS data folder.
      examples: what to write; no split may be empty. Images are stored as PNG, encoded images as they are.
      on_example: called after each example.
    """

    # TFDS takes a data set's name from the builder's class, hence a class per set. It stays out of TFDS's registry,
    # where mnist and others already are.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = data_set.name
        VERSION = tfds.core.Version(OUR_VERSION)
        RELEASE_NOTES = {OUR_VERSION: "First version."}

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(
                    shape=data_set.image_shape, encoding_format="jpeg" if data_set.in_folders else "png"
                ),
                "label": tfds.features.ClassLabel(names=list(examples.class_names)),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=data_set.keep_order,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {name: self._generate_examples(*split) for name, split in examples.splits.items()}

        def _generate_examples(self, images: Images, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, label in enumerate(labels):
                yield index, {"image": _as_tfds_takes_it(images[index]), "label": int(label)}
                on_example()

    return Builder(data_dir=str(data_dir), file_format="array_record")


def _as_tfds_takes_it(image: np.ndarray | bytes) -> Image.Image | bytes:
    if isinstance(image, bytes):
        return image
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
