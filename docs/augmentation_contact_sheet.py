"""An image of what the augmentation does: rows of raw, perspective, rotated and doubly warped images.

python docs/augmentation_contact_sheet.py --data ../shared/data/mnist.npz --out docs/augmentation_contact_sheet.png
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

from pspinal_jax.augment import (
    Augmentation,
    apply_warp,
    draw_warp,
    perspective_coefficients,
    rotate,
    warp_perspective,
)
from pspinal_jax.errors import PSpinalError
from pspinal_jax.files import check_target

_GAP = 4
_LABEL_WIDTH = 84
_GREY = 90


def load_images(path: Path, count: int) -> np.ndarray:
    """The first `count` training images of an .npz file, uint8 [count, H, W, C].

    Raises:
      ValueError: if the file holds no uint8 array `train_images` of three or four axes with that many images.
      OSError: if it cannot be read.
    """
    with np.load(path) as data:
        if "train_images" not in data:
            raise ValueError(f"{path} has no array 'train_images'; it has {', '.join(data.files) or 'none'}")
        images = data["train_images"][:count]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) < count:
        raise ValueError(
            f"{path}: 'train_images' must be {count} or more uint8 images, got {images.dtype} {images.shape}"
        )
    return images if images.ndim == 4 else images[..., None]


def sheet_rows(images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The rows of the sheet by their label, each like `images` uint8 [N, H, W, C]; perspective warps every image."""
    count, height, width, _ = images.shape
    warp = draw_warp(jax.random.key(seed), count, height, width, Augmentation(probability=1.0))
    coefficients = perspective_coefficients(warp.corners, height, width)
    return {
        "raw": images,
        "perspective": np.asarray(warp_perspective(images, coefficients)),
        "rotated": np.asarray(rotate(images, warp.angles)),
        "both": np.asarray(apply_warp(images, warp)),
    }


def draw_sheet(rows: dict[str, np.ndarray], scale: int) -> Image.Image:
    """The rows below one another, their labels to the left, every pixel enlarged to `scale` x `scale`."""
    count, height, width, _ = next(iter(rows.values())).shape
    step_x, step_y = width * scale + _GAP, height * scale + _GAP
    # Grey between the images shows where their black borders end.
    sheet = Image.new("RGB", (_LABEL_WIDTH + count * step_x, _GAP + len(rows) * step_y), (_GREY,) * 3)
    draw = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows.items()):
        top = _GAP + row * step_y
        draw.text((_GAP * 2, top + height * scale // 2 - 6), label, fill=(255, 255, 255))
        for column, image in enumerate(images):
            tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image[..., :3])
            tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (_LABEL_WIDTH + column * step_x, top))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    """Read the command line (`arguments`, or the process's own), draw the sheet and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=".npz with uint8 'train_images' [N, H, W] or [.., C]")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--count", type=int, default=12, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the warps")
    parser.add_argument("--scale", type=int, default=3, help="size of a pixel")
    options = parser.parse_args(arguments)
    try:
        check_target(options.out, "--out")
        images = load_images(options.data, options.count)
    except (OSError, ValueError, PSpinalError) as error:
        parser.error(str(error))
    draw_sheet(sheet_rows(images, options.seed), options.scale).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
