"""What torchvision does to one image, with Pillow and float64: the reference of the parity tests."""

import numpy as np
from PIL import Image


def coefficients(corners, height, width, dtype=np.float32):
    """torchvision's _get_perspective_coeffs: eight equations in float64, the solution rounded to float32."""
    right, bottom = width - 1, height - 1
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, [(0, 0), (right, 0), (right, bottom), (0, bottom)], strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
        values += [u, v]
    return np.linalg.solve(np.array(rows, np.float64), np.array(values, np.float64)).astype(dtype)


def _each(images, transform):
    if images.shape[-1] == 3:
        return np.stack([transform(Image.fromarray(image), index) for index, image in enumerate(images)])
    # Channel by channel: Pillow would take the last of two or four for an alpha channel.
    planes = images.transpose(3, 0, 1, 2)
    results = [[transform(Image.fromarray(image), index) for index, image in enumerate(plane)] for plane in planes]
    return np.array(results).transpose(1, 2, 3, 0)


def perspective(images, corners, dtype=np.float32):
    height, width = images.shape[1:3]
    start = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]])

    def transform(image, index):
        if (corners[index] == start).all():
            return image
        data = [float(value) for value in coefficients(corners[index], height, width, dtype)]
        return image.transform(image.size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR, fillcolor=0)

    return _each(images, transform)


def rotate(images, angles):
    def transform(image, index):
        return image.rotate(float(angles[index]), Image.Resampling.NEAREST, False, None, fillcolor=0)

    return _each(images, transform)


def differences(ours, theirs):
    """(share of entries that differ, largest difference)."""
    gap = np.abs(np.asarray(ours).astype(int) - theirs.astype(int))
    return (gap > 0).mean(), gap.max()
