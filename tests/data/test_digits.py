import subprocess
import sys

import numpy as np
import pytest

from pspinal_jax.data import load_data
from pspinal_jax.errors import DataError
from pspinal_jax.recipes import DataConfig

PREPARE = (
    "import sys; from pathlib import Path; from pspinal_jax.data import load_data; "
    "from pspinal_jax.recipes import DataConfig; "
    "data = load_data(DataConfig('digits', data_dir=Path(sys.argv[1]))); "
    "assert 'tensorflow' not in sys.modules; print(data.fingerprint())"
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The digits as two processes prepare them at the same time."""
    folder = tmp_path_factory.mktemp("tfds")
    command = [sys.executable, "-c", PREPARE, str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] and outputs[0]
    return folder


def test_digits_go_through_tfds_without_tensorflow(prepared):
    from sklearn.datasets import load_digits

    data = load_data(DataConfig("digits", data_dir=prepared))
    assert data.train.inputs.shape == (1437, 8, 8, 1) and data.test.inputs.shape == (360, 8, 8, 1)
    assert data.class_names == tuple("0123456789")
    bunch = load_digits()
    whole = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    here = np.concatenate([data.train.inputs, data.test.inputs])[..., 0]
    labels = np.concatenate([data.train.labels, data.test.labels])

    def multiset(images, labels):
        return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))

    assert multiset(here, labels) == multiset(whole, bunch.target)


def test_a_prepared_directory_is_a_data_path(prepared):
    (directory,) = (path.parent for path in prepared.glob("digits/*/dataset_info.json"))
    by_path = load_data(DataConfig("anything", path=directory))
    assert by_path.fingerprint() == load_data(DataConfig("digits", data_dir=prepared)).fingerprint()


def test_a_damaged_record_file_is_named(prepared, tmp_path):
    import shutil

    shutil.copytree(prepared / "digits", tmp_path / "digits")
    record = next(tmp_path.glob("digits/*/*test*array_record*"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        load_data(DataConfig("digits", data_dir=tmp_path))


def test_a_set_that_is_not_prepared_is_named(tmp_path):
    with pytest.raises(DataError, match=r"mnist is not prepared in .*--data\.path"):
        load_data(DataConfig("mnist", data_dir=tmp_path))


def test_a_directory_without_a_data_set_is_named(tmp_path):
    with pytest.raises(DataError, match="is not a data set that TFDS can read"):
        load_data(DataConfig("mnist", path=tmp_path))
