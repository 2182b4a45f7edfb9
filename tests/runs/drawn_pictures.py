"""Pictures to learn from: one bright shape somewhere on a textured background, a folder a shape."""

import numpy as np
from PIL import Image, ImageDraw

TINY = ["--model.backbone", "resnet18", "--model.weights", "None", "--data.image-size", "32", "--batch-size", "8"]
"""Flags that make any photograph recipe small, with the fixture `tiny_resnet`."""

SHAPES = ("circle", "cross", "square", "triangle")


def draw(shape: str, rng: np.random.Generator, side: int = 80) -> Image.Image:
    coarse = rng.integers(30, 130, (side // 8, side // 8, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 20, (side, side, 3))
    image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    radius = rng.integers(side // 5, side // 3)
    x, y = rng.integers(radius, side - radius, 2)
    colour = tuple(int(value) for value in rng.integers(160, 256, 3))
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    elif shape == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), colour)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], colour)
    else:
        arm = radius // 3
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), colour)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), colour)
    return image


def write_folder(path, count, seed=0, side=80, shapes=SHAPES):
    """`count` pictures of each of `shapes` in `path`/SHAPE."""
    rng = np.random.default_rng(seed)
    for shape in shapes:
        (path / shape).mkdir(parents=True)
        for index in range(count):
            draw(shape, rng, side).save(path / shape / f"{index:03}.jpg", quality=90)
    return path
