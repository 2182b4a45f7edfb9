"""From a recipe's data configuration to arrays, whatever the source."""

from pathlib import Path

from pspinal_jax.data.arrays import Dataset
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.prepared import import_tfds, prepare, read_builder, read_prepared
from pspinal_jax.errors import DataError
from pspinal_jax.recipes.schema import DataConfig


def load_dataset(config: DataConfig) -> Dataset:
    """The data set that `config` names.

    Args:
      config: with `path`, that .npz file or prepared TFDS directory is read. Without, the TFDS data set `name` is
        read from `data_dir`; 'digits' is prepared there on first use, from scikit-learn's copy.

    Raises:
      DataError: if it is not there or not readable; the message says what to do.
    """
    if config.path is not None:
        path = config.path.expanduser()
        return read_prepared(path, config.num_classes) if path.is_dir() else read_npz(path, config.num_classes)
    tfds = import_tfds()
    data_dir = None if config.data_dir is None else str(config.data_dir.expanduser())
    if config.name == "digits":
        from pspinal_jax.data.digits import Digits

        try:
            builder = Digits(data_dir=data_dir, file_format="array_record")
            prepare(builder)
        except OSError as error:
            raise DataError(f"digits cannot be prepared: {error}; choose another folder with --data.data-dir") from None
        return read_builder(builder, config.num_classes)
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    versions = sorted(path.parent for path in (root / config.name).glob("*/dataset_info.json"))
    if not versions:
        raise DataError(
            f"data set {config.name} is not prepared in {root}; give --data.path an .npz file or a directory that TFDS "
            "prepared as array_record, or set --data.data-dir"
        )
    return read_prepared(versions[-1], config.num_classes)
