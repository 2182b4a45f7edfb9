"""Pictures in memory, and pictures whose number can be read off them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pspinal_jax.data.images import Encoded, ImageSplit


def picture(number, size=(6, 8), kind="PNG"):
    """The bytes of a picture [H, W] that is filled with (number, number // 2, 255 - number)."""
    buffer = io.BytesIO()
    Image.new("RGB", size[::-1], (number, number // 2, 255 - number)).save(buffer, kind)
    return buffer.getvalue()


class InMemory(Encoded):
    """`Encoded` that, given a folder, leaves a file there for every picture that was read."""

    def __init__(self, pictures: list[bytes], seen: Path | None = None) -> None:
        self.pictures, self.seen = pictures, seen

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> bytes:
        if self.seen is not None:
            (self.seen / str(index)).touch()
        return self.pictures[index]

    def name(self, index: int) -> str:
        return f"picture {index}"


def numbered(count, seen=None, num_classes=3):
    """ImageSplit of which number i shows i and has the label i modulo `num_classes`."""
    return ImageSplit(
        InMemory([picture(i) for i in range(count)], seen), np.arange(count, dtype=np.int32) % num_classes
    )
