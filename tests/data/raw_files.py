"""Writes tiny data sets in the exact formats that the six sets are published in."""

import gzip
import zipfile

import numpy as np

MNIST_NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
QMNIST_NAMES = (
    "qmnist-train-images-idx3-ubyte.gz",
    "qmnist-train-labels-idx2-int.gz",
    "qmnist-test-images-idx3-ubyte.gz",
    "qmnist-test-labels-idx2-int.gz",
)


def emnist_names(part):
    return tuple(
        f"emnist-{part}-{split}-{kind}-ubyte.gz"
        for split in ("train", "test")
        for kind in ("images-idx3", "labels-idx1")
    )


NUM_CLASSES = {
    "mnist": 10,
    "fashion_mnist": 10,
    "kmnist": 10,
    "qmnist": 10,
    "emnist_digits": 10,
    "emnist_letters": 26,
}


def idx(array):
    """The bytes of an IDX file of a uint8 or int32 array."""
    code = {"uint8": 8, "int32": 12}[array.dtype.name]
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def examples(num_classes, num_train=40, num_test=30, seed=0):
    """Upright images whose transpose differs, and labels of which every class occurs."""
    rng = np.random.default_rng(seed)
    made = {}
    for split, count in (("train", num_train), ("test", num_test)):
        images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        images[:, 20:] = 0
        made[split] = (images, (np.arange(count) % num_classes).astype(np.uint8))
    return made


def raw_contents(name, made):
    """File name -> uncompressed IDX bytes, as published."""
    (train_images, train_labels), (test_images, test_labels) = made["train"], made["test"]
    if name == "qmnist":
        arrays = (train_images, _columns(train_labels), test_images, _columns(test_labels))
        return dict(zip(QMNIST_NAMES, map(idx, arrays), strict=True))
    if name.startswith("emnist"):
        part = name.removeprefix("emnist_")
        first = np.uint8(part == "letters")
        arrays = (
            train_images.transpose(0, 2, 1),
            train_labels + first,
            test_images.transpose(0, 2, 1),
            test_labels + first,
        )
        return dict(zip(emnist_names(part), map(idx, arrays), strict=True))
    return dict(zip(MNIST_NAMES, map(idx, (train_images, train_labels, test_images, test_labels)), strict=True))


def _columns(labels):
    columns = np.arange(len(labels) * 8, dtype=np.int32).reshape(-1, 8) + 100_000
    columns[:, 0] = labels
    return columns


def write_raw(folder, name, made):
    """Write the files that `name` is published as into `folder`; EMNIST as its zip."""
    folder.mkdir(exist_ok=True)
    contents = {file: gzip.compress(data, 1) for file, data in raw_contents(name, made).items()}
    if name.startswith("emnist"):
        with zipfile.ZipFile(folder / "gzip.zip", "w") as archive:
            for file, data in contents.items():
                archive.writestr(f"gzip/{file}", data)
            archive.writestr("gzip/emnist-byclass-mapping.txt", "0 48\n")
    else:
        for file, data in contents.items():
            (folder / file).write_bytes(data)
    return folder
