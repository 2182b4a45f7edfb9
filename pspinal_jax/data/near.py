"""Images that look alike: copies in another format, size or quality, or mirrored; most cropped copies are missed.

Two images are near where their looks, grey thumbnails of 16 by 16 pixels without their mean, have a cosine of at least
`NEAR`, one of them perhaps mirrored left to right. docs/unknown.md has what that finds.
"""

import base64
from collections.abc import Iterable

import numpy as np

NEAR = 0.98
_SIDE = 16
_LEVELS = np.array([0.299, 0.587, 0.114], np.float32)
_CHUNK = 2**27  # bytes of cosines at a time


def look(pixels: np.ndarray) -> str:
    """The look of an image uint8 [32, 32, 3], as text.

    It is larger than the look because a JPEG that is decoded smaller differs a little from the same pixels in a PNG.
    """
    grey = (pixels @ _LEVELS).reshape(_SIDE, 2, _SIDE, 2).mean((1, 3))
    return base64.b64encode(grey.round().astype(np.uint8).tobytes()).decode()


def as_array(looks: Iterable[str]) -> np.ndarray:
    """Looks as uint8 [N, 256]."""
    levels = np.frombuffer(b"".join(map(base64.b64decode, looks)), np.uint8)
    return levels.reshape(-1, _SIDE * _SIDE)


def find_pairs(looks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of near images, of looks uint8 [N, 256]: int64 [P, 2], the smaller index first, the nearest pair first;
    and their cosines [P]. An image of one grey is near to nothing.
    """
    rows = looks - looks.mean(1, keepdims=True, dtype=np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1.0)
    mirrored = rows.reshape(-1, _SIDE, _SIDE)[:, :, ::-1].reshape(rows.shape)
    size, found = max(1, _CHUNK // (4 * max(1, len(rows)))), [np.zeros((0, 3))]
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        cosines = np.maximum(block @ rows[start:].T, block @ mirrored[start:].T)
        first, second = np.nonzero(cosines >= NEAR)
        found.append(np.column_stack([first + start, second + start, cosines[first, second]])[second > first])
    pairs = np.concatenate(found)
    pairs = pairs[np.argsort(-pairs[:, 2], kind="stable")]
    return pairs[:, :2].astype(np.int64), pairs[:, 2]
