"""What counts as a picture that looks alike: the table of planted copies in docs/unknown.md.

    python results/near.py CALTECH101.zip

Of 300 photographs of Caltech-101 changed copies are made, and compared with their originals; then the pairs among all
8,677 originals are counted, at several thresholds.
"""

import io
import sys
import zipfile

import numpy as np
from PIL import Image, ImageEnhance

from pspinal_jax.data import near
from pspinal_jax.data.images.decode import decode

COUNT = 300


def jpeg(image, quality=90):
    """The image, as a JPEG."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


def png(image):
    """The image, as a PNG."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def scaled(image, factor):
    """The image, larger or smaller."""
    return jpeg(image.resize((round(factor * image.width), round(factor * image.height)), Image.Resampling.LANCZOS))


def cropped(image, part):
    """The image without `part` of its width and height at each side."""
    x, y = round(part * image.width), round(part * image.height)
    return jpeg(image.crop((x, y, image.width - x, image.height - y)))


CHANGES = {
    "another format (PNG)": png,
    "JPEG quality 60": lambda image: jpeg(image, 60),
    "three quarters of the size": lambda image: scaled(image, 0.75),
    "twice the size": lambda image: scaled(image, 2),
    "grey": lambda image: jpeg(image.convert("L")),
    "a fifth brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.2)),
    "a fifth more contrast": lambda image: jpeg(ImageEnhance.Contrast(image).enhance(1.2)),
    "2 % cropped at each side": lambda image: cropped(image, 0.02),
    "5 % cropped at each side": lambda image: cropped(image, 0.05),
    "mirrored": lambda image: jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
}


def looks(contents):
    """The looks of encoded images."""
    return near.as_array(near.look(decode(content, (32, 32))) for content in contents)


def main():
    """Print the tables."""
    with zipfile.ZipFile(sys.argv[1]) as archive:
        contents = [archive.read(name) for name in sorted(archive.namelist()) if name.endswith(".jpg")]
    of_all = looks(contents)
    chosen = np.random.default_rng(0).permutation(len(contents))[:COUNT]
    for name, change in CHANGES.items():
        copies = looks(change(Image.open(io.BytesIO(contents[index])).convert("RGB")) for index in chosen)
        mirrored = copies.reshape(-1, 16, 16)[:, :, ::-1].reshape(copies.shape)
        rows = [each - each.mean(1, keepdims=True, dtype=np.float32) for each in (of_all[chosen], copies, mirrored)]
        rows = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in rows]
        cosines = np.maximum((rows[0] * rows[1]).sum(1), (rows[0] * rows[2]).sum(1))
        low = ", ".join(f"{value:.4f}" for value in np.quantile(cosines, [0.01, 0.05, 0.5]))
        print(f"| {name} | {100 * (cosines >= near.NEAR).mean():.1f} | {low} |", flush=True)
    for least in (0.999, 0.995, 0.99, 0.98, 0.97, 0.95):
        near.NEAR = least
        print(f"{len(near.find_pairs(of_all)[0]):,} pairs of originals at {least}", flush=True)


if __name__ == "__main__":
    main()
