"""Writes tiny data sets of photographs in the exact formats that the four sets are published in."""

import io
import tarfile
import zipfile

import numpy as np
from PIL import Image


def jpeg(number, size=(12, 16), mode="RGB"):
    """A JPEG filled with a grey of `number`."""
    buffer = io.BytesIO()
    Image.new(mode, size[::-1], number if mode == "L" else (number,) * 3).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tar_gz(members):
    """The bytes of a tar.gz of path -> contents; None makes a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, content in members.items():
            entry = tarfile.TarInfo(path)
            entry.type, entry.size = (tarfile.DIRTYPE, 0) if content is None else (tarfile.REGTYPE, len(content))
            archive.addfile(entry, None if content is None else io.BytesIO(content))
    return buffer.getvalue()


def write_files(folder, members):
    """Write path -> contents below `folder`."""
    for path, content in members.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (folder / path).write_bytes(content)
    return folder


def write_zip(path, members):
    """Write path -> contents as a zip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name if content is not None else f"{name}/", content or b"")
    return path


def stl10_arrays(num_train=12, num_test=11):
    """split -> (images uint8 [N, 96, 96, 3], labels 0 .. 9), rows, columns and colours all different."""
    rng = np.random.default_rng(0)
    return {
        split: (rng.integers(0, 256, (count, 96, 96, 3)).astype(np.uint8), (np.arange(count) % 10).astype(np.uint8))
        for split, count in (("train", num_train), ("test", num_test))
    }


def stl10_files(arrays):
    """File name -> contents, as in stl10_binary: three planes per image, each column by column; labels from 1."""
    files = {"class_names.txt": b"airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n"}
    for split, (images, labels) in arrays.items():
        planes = [image[:, :, channel].tobytes(order="F") for image in images for channel in range(3)]
        files[f"{split}_X.bin"] = b"".join(planes)
        files[f"{split}_y.bin"] = (labels + 1).astype(np.uint8).tobytes()
    return files | {"unlabeled_X.bin": bytes(96 * 96 * 3), "fold_indices.txt": b"0 1\n"}


CALTECH_CLASSES = ("Faces", "Faces_easy", "accordion")


def caltech_members(counts=(33, 31, 35)):
    """The inner archive's members: pictures of `counts` per class, some grey, what is no class, and the stray file."""
    members = {"101_ObjectCategories": None, "101_ObjectCategories/BACKGROUND_Google/tmp": b"stray"}
    members["101_ObjectCategories/BACKGROUND_Google/image_0001.jpg"] = jpeg(250)
    for label, (name, count) in enumerate(zip(CALTECH_CLASSES, counts, strict=True)):
        for number in range(count):
            path = f"101_ObjectCategories/{name}/image_{number + 1:04d}.jpg"
            members[path] = jpeg(50 * label + number, mode="L" if number % 5 == 0 else "RGB")
    return members


def caltech_zip(members):
    """The outer archive's members."""
    return {
        "caltech-101/101_ObjectCategories.tar.gz": tar_gz(members),
        "caltech-101/Annotations.tar": b"",
        "caltech-101/show_annotation.m": b"",
        "__MACOSX/caltech-101/._101_ObjectCategories.tar.gz": b"junk",
    }


def fruits_members():
    """Fruits-360 below its folder, with what lies beside Training and Test."""
    members = {"fruits-360/LICENSE": b"", "fruits-360/test-multiple_fruits/apple.jpg": jpeg(1)}
    for label, name in enumerate(("Apple Braeburn", "Cherry 1", "Kiwi")):
        for number in range(3):
            members[f"fruits-360/Training/{name}/{number}_100.jpg"] = jpeg(60 * label + number, (10, 10))
        members[f"fruits-360/Test/{name}/r_7_100.jpg"] = jpeg(60 * label + 30, (10, 10))
    return members


def birds_members():
    """Birds with their class folders' spaces, and what else lies there."""
    members = {"bird_dataset.csv": b"", "images to predict/1.jpg": jpeg(1)}
    for label, name in enumerate(("AFRICAN CROWNED CRANE", "ALBATROSS")):
        for place, (split, count) in enumerate((("train", 4), ("valid", 2), ("test", 2))):
            for number in range(1, count + 1):
                members[f"{split}/{name}/{number}.jpg"] = jpeg(100 * label + 20 * place + number)
    return members
