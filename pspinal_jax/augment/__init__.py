"""Augmentation of image batches on the device, inside the compiled step. Nothing here imports more than jax and numpy.

`augment` applies torchvision's RandomPerspective (bilinear, fill 0) and RandomRotation (nearest, fill 0, about the
centre) to a batch, with the same pixels as Pillow. Random numbers and warps are separate: `draw_perspective` and
`draw_angles` depend only on a key, `warp_perspective` and `rotate` only on their parameters. `rotate_crop_flip`
rotates, crops and flips colour images. Besides the paper's augmentation there are `resized_crop_flip`, `color_jitter`
and `mix` (mixup and cutmix).
"""

from pspinal_jax.augment.color import adjust_color, color_jitter, draw_color
from pspinal_jax.augment.crop import (
    Boxes,
    CropAugmentation,
    ResizedCrop,
    View,
    apply_boxes,
    apply_view,
    draw_boxes,
    draw_view,
    resized_crop_flip,
    rotate_crop_flip,
)
from pspinal_jax.augment.mixing import Mixed, mix
from pspinal_jax.augment.warp import (
    Augmentation,
    Warp,
    apply_warp,
    augment,
    draw_angles,
    draw_perspective,
    draw_warp,
    perspective_coefficients,
    rotate,
    warp_perspective,
)

__all__ = [
    "Augmentation",
    "Boxes",
    "CropAugmentation",
    "Mixed",
    "ResizedCrop",
    "View",
    "Warp",
    "adjust_color",
    "apply_boxes",
    "apply_view",
    "apply_warp",
    "augment",
    "color_jitter",
    "draw_angles",
    "draw_boxes",
    "draw_color",
    "draw_perspective",
    "draw_view",
    "draw_warp",
    "mix",
    "perspective_coefficients",
    "resized_crop_flip",
    "rotate",
    "rotate_crop_flip",
    "warp_perspective",
]
