"""The data sets that we can prepare ourselves: a table of what they are made of. Imports nothing heavy."""

import dataclasses
import difflib
import string
from collections.abc import Mapping
from typing import Literal

from pspinal_jax.errors import UsageError

OUR_VERSION = "1.0.0"
"""Of what we prepare. Not the numbers of TFDS's own versions, so that the two can lie side by side."""


@dataclasses.dataclass(frozen=True)
class Download:
    """A file as it stands upstream."""

    file: str
    url: str
    sha256: str
    num_bytes: int | None
    """None where no size is on record; the checksum decides either way."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set: its files, and how to read them.

    Attributes:
      name: what `prepare` and TFDS call it.
      image_shape: (H, W, C); None where images differ.
      class_names: in the order of the labels 0 .. C-1; empty where the folders' names are taken.
      files: split -> (file of images, file of labels); for images in class folders, split -> (its folder,). Empty for
        the set that scikit-learn ships.
      downloads: what to fetch: those files, or the archive that holds them.
      folder: name of the folder that downloads go to; MNIST's names recur in KMNIST and Fashion-MNIST.
      archive: name of the zip file that holds the files, or None.
      archive_folder: folder inside that zip, and what extracting it makes.
      first_label: the label of class 0 as stored.
      label_columns: None for labels alone, else int32 columns of which the first is the label.
      transposed: whether images are stored with rows and columns swapped.
      parts: further splits: name -> (split they are cut from, first example, end or None).
      keep_order: whether examples stay in the files' order; otherwise TFDS shuffles them, the same way every time.
      layout: how the files are stored.
      num_folders: number of class folders, for a set of images in class folders.
      left_out: a folder among them that is no class.
      num_train: how many images of each class are drawn to train on, of a set that has only one folder; the rest is
        to test on.
      origin: where the files come from, if nothing can be downloaded.
      row: the row of the paper's table that was measured on it, or "".
      sizes: how many examples it has to train on, validation included, and to test on; of those with a row.
    """

    name: str
    image_shape: tuple[int | None, int | None, int]
    class_names: tuple[str, ...] = ()
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    downloads: tuple[Download, ...] = ()
    folder: str = ""
    archive: str | None = None
    archive_folder: str = ""
    first_label: int = 0
    label_columns: int | None = None
    transposed: bool = False
    parts: Mapping[str, tuple[str, int, int | None]] = dataclasses.field(default_factory=dict)
    keep_order: bool = True
    layout: Literal["idx", "stl10", "class folders"] = "idx"
    num_folders: int = 0
    left_out: str = ""
    num_train: int = 0
    origin: str = ""
    row: str = ""
    sizes: tuple[int, int] = (0, 0)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names) or self.num_folders

    @property
    def in_folders(self) -> bool:
        """Whether it is made of images in class folders, which stay as they were encoded."""
        return self.layout == "class folders"

    @property
    def file_names(self) -> tuple[str, ...]:
        """Every file's name in `files`."""
        return tuple(name for pair in self.files.values() for name in pair)


_DIGITS = tuple(string.digits)
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_QMNIST_FILES = {
    split: (f"qmnist-{split}-images-idx3-ubyte.gz", f"qmnist-{split}-labels-idx2-int.gz") for split in ("train", "test")
}


def _downloads(
    base: str, files: Mapping[str, tuple[str, str]], *checks: tuple[str, int | None]
) -> tuple[Download, ...]:
    names = [name for pair in files.values() for name in pair]
    return tuple(Download(name, base + name, *check) for name, check in zip(names, checks, strict=True))


# Addresses, checksums and sizes of MNIST, Fashion-MNIST, KMNIST, EMNIST, STL-10 and Caltech-101 are those of TFDS's own
# registry.
_MNIST = _downloads(
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    _MNIST_FILES,
    ("440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609", 9912422),
    ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c", 28881),
    ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6", 1648877),
    ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6", 4542),
)
_FASHION_MNIST = _downloads(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    _MNIST_FILES,
    ("3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26421880),
    ("a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29515),
    ("346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4422102),
    ("67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5148),
)
_KMNIST = _downloads(
    "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    _MNIST_FILES,
    ("51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4", 18165135),
    ("e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17", 29497),
    ("edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5", 3041136),
    ("20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c", 5120),
)
# TFDS has no QMNIST. These checksums are the ones that torchvision's prototype data sets record, whose checksums of
# MNIST, Fashion-MNIST and KMNIST agree with TFDS's; we have not seen the files themselves.
_QMNIST = _downloads(
    "https://raw.githubusercontent.com/facebookresearch/qmnist/master/",
    _QMNIST_FILES,
    ("9e26a7bf1683614e065d7b76460ccd52807165b3f22561fb782bd9f38c52b51d", None),
    ("2c05dc77f6b916b38e455e97ab129a42a444f3dbef09b278a366f82904e0dd9f", None),
    ("43fc22bf7498b8fc98de98369d72f752d0deabc280a43a7bcc364ab19e57b375", None),
    ("9fbcbe594c3766fdf4f0b15c5165dc0d1e57ac604e01422608bb72c906030d06", None),
)
_EMNIST = (
    Download(
        "gzip.zip",
        "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
        "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e",
        561753746,
    ),
)
_STL10 = (
    Download(
        "stl10_binary.tar.gz",
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
        2640397119,
    ),
)
_CALTECH101 = (
    Download(
        "caltech-101.zip",
        "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip?download=1",
        "331234750fc7f77520e50d9565e8b6907b03565e30320da1401130db08c61f91",
        137414764,
    ),
)


def _mnist_like(name: str, class_names: tuple[str, ...], downloads: tuple[Download, ...], row: str = "") -> DataSet:
    files = _MNIST_FILES
    return DataSet(name, (28, 28, 1), class_names, files, downloads, folder=name, row=row, sizes=(60_000, 10_000))


def _emnist(part: str, class_names: tuple[str, ...], first_label: int, sizes: tuple[int, int]) -> DataSet:
    files = {
        split: (f"emnist-{part}-{split}-images-idx3-ubyte.gz", f"emnist-{part}-{split}-labels-idx1-ubyte.gz")
        for split in ("train", "test")
    }
    return DataSet(
        f"emnist_{part}",
        (28, 28, 1),
        class_names,
        files,
        _EMNIST,
        folder="emnist",
        archive="gzip.zip",
        archive_folder="gzip",
        first_label=first_label,
        transposed=True,
        row=f"EMNIST-{part.title()}",
        sizes=sizes,
    )


CATALOGUE: dict[str, DataSet] = {
    data_set.name: data_set
    for data_set in (
        # Shuffled by TFDS since its first version; runs on it stay comparable that way.
        DataSet("digits", (8, 8, 1), _DIGITS, keep_order=False),
        _mnist_like("mnist", _DIGITS, _MNIST, "MNIST"),
        _mnist_like("fashion_mnist", _FASHION, _FASHION_MNIST),
        _mnist_like("kmnist", _KUZUSHIJI, _KMNIST, "KMNIST"),
        DataSet(
            "qmnist",
            (28, 28, 1),
            _DIGITS,
            _QMNIST_FILES,
            _QMNIST,
            folder="qmnist",
            label_columns=8,
            # The 10,000 of MNIST's test split as its makers found them again, and the 50,000 that had been lost.
            parts={"test10k": ("test", 0, 10_000), "test50k": ("test", 10_000, None)},
            row="QMNIST",
            sizes=(60_000, 60_000),
        ),
        _emnist("digits", _DIGITS, first_label=0, sizes=(240_000, 40_000)),
        _emnist("letters", tuple(string.ascii_uppercase), first_label=1, sizes=(124_800, 20_800)),
        DataSet(
            "stl10",
            (96, 96, 3),
            ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
            {split: (f"{split}_X.bin", f"{split}_y.bin") for split in ("train", "test")},
            layout="stl10",
            downloads=_STL10,
            folder="stl10",
            archive="stl10_binary.tar.gz",
            archive_folder="stl10_binary",
            first_label=1,
            row="STL-10",
            sizes=(5_000, 8_000),
        ),
        # Its smallest class has 31 images.
        DataSet(
            "caltech101",
            (None, None, 3),
            files={"all": ("101_ObjectCategories",)},
            layout="class folders",
            downloads=_CALTECH101,
            folder="caltech101",
            archive="caltech-101.zip",
            archive_folder="caltech-101",
            num_folders=101,
            left_out="BACKGROUND_Google",
            num_train=30,
            row="Caltech-101",
            sizes=(3_030, 5_647),
        ),
        DataSet(
            "fruits360",
            (None, None, 3),
            files={"train": ("Training",), "test": ("Test",)},
            layout="class folders",
            num_folders=131,
            origin="Fruits-360, release 2020.05.18: Kaggle, moltean/fruits, or GitHub, Horea94/Fruit-Images-Dataset",
            row="Fruits-360",
            sizes=(67_692, 22_688),
        ),
        DataSet(
            "birds225",
            (None, None, 3),
            files={"train": ("train",), "validation": ("valid",), "test": ("test",)},
            layout="class folders",
            num_folders=225,
            origin="225 Bird Species: Kaggle, gpiosenka/100-bird-species, the version with 225 species",
            row="Bird-225",
            sizes=(32_441, 1_125),
        ),
    )
}


def find_data_set(name: str) -> DataSet:
    """The entry `name`; a recipe's spelling with hyphens is understood too.

    Raises:
      UsageError: if there is none; the message suggests one.
    """
    key = name.replace("-", "_")
    if key in CATALOGUE:
        return CATALOGUE[key]
    close = difflib.get_close_matches(key, CATALOGUE, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"unknown data set {name!r}; {hint}There are: {', '.join(CATALOGUE)}")
