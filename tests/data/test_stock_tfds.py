"""What TFDS's own builders prepared: mnist and its kin are read as they are, emnist is refused."""

import io

import numpy as np
import pytest
from raw_files import examples

from pspinal_jax.data import load_data
from pspinal_jax.data import tfds as tfds_reader
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.data.prepare import prepare_data_set
from pspinal_jax.errors import DataError
from pspinal_jax.recipes import DataConfig

MADE = examples(10)


def prepare_as_tfds(data_dir, name, config=None, num_classes=10):
    """Prepare MADE as TFDS's builder of that name does: same features, shuffled, same layout of folders."""
    import tensorflow_datasets as tfds
    from PIL import Image

    class Stock(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.1")
        BUILDER_CONFIGS = [] if config is None else [tfds.core.BuilderConfig(name=config)]

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=num_classes),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(*arrays) for name, arrays in MADE.items()}

        def _generate_examples(self, images, labels):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": Image.fromarray(image), "label": int(label)}

    Stock.name = name
    builder = Stock(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return data_dir / name if config is None else data_dir / name / config


def multiset(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize("shape", [(4, 5, 1), (4, 5, 3)])
def test_encoded_images_have_a_channel_axis(shape):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "PNG")
    np.testing.assert_array_equal(tfds_reader._decode(file.getvalue()), pixels)
    assert tfds_reader._decode(pixels) is pixels


@pytest.mark.parametrize("name", ["mnist", "kmnist", "fashion_mnist"])
def test_mnist_and_its_kin_are_read_by_name_and_by_path(tmp_path, name):
    directory = prepare_as_tfds(tmp_path, name) / "3.0.1"
    by_name = load_data(DataConfig(name, data_dir=tmp_path, num_classes=10))
    assert load_data(DataConfig("other", path=directory)).fingerprint() == by_name.fingerprint()
    for split, arrays in MADE.items():
        here = getattr(by_name, split)
        assert multiset(here.inputs, here.labels) == multiset(*arrays)
    # `prepare` finds it too, and needs no files.
    done = prepare_data_set(CATALOGUE[name], tmp_path)
    assert done.was_there and done.directory == directory


def test_emnist_is_refused_by_path_and_by_name(tmp_path):
    directory = prepare_as_tfds(tmp_path, "emnist", "letters", 37) / "3.0.1"
    configs = [DataConfig("emnist_letters", path=directory)]
    configs += [DataConfig(name, data_dir=tmp_path) for name in ("emnist", "emnist/letters")]
    for config in configs:
        with pytest.raises(DataError, match=r"transposed.* 37 classes .*88,800 of the 124,800") as caught:
            load_data(config)
        assert "pspinal-jax prepare emnist_letters" in str(caught.value) and "\n" not in str(caught.value)


def test_a_readable_version_is_preferred_to_a_newer_one_in_another_format(tmp_path):
    prepare_as_tfds(tmp_path, "mnist")
    newer = tmp_path / "mnist" / "10.0.0"
    newer.mkdir()
    (newer / "dataset_info.json").write_text('{"name": "mnist", "version": "10.0.0", "fileFormat": "tfrecord"}')
    assert "3.0.1" in load_data(DataConfig("mnist", data_dir=tmp_path)).source


def test_what_tfds_was_still_writing_is_not_read(tmp_path):
    directory = prepare_as_tfds(tmp_path, "mnist") / "3.0.1"
    directory.rename(directory.with_name("incomplete.ABCDEF_3.0.1"))
    with pytest.raises(DataError, match=r"mnist is not prepared in .*; run: pspinal-jax prepare mnist --data-dir"):
        load_data(DataConfig("mnist", data_dir=tmp_path))


def test_an_unknown_set_is_not_offered_a_prepare_that_would_fail(tmp_path):
    with pytest.raises(DataError, match="cifar10 is not prepared") as caught:
        load_data(DataConfig("cifar10", data_dir=tmp_path))
    assert "pspinal-jax prepare" not in str(caught.value)


def test_labels_are_numbers_where_tfds_names_no_classes(tmp_path):
    prepare_as_tfds(tmp_path, "mnist")
    data = load_data(DataConfig("mnist", data_dir=tmp_path))
    assert data.class_names == tuple(map(str, range(10))) and data.train.labels.dtype == np.int32
