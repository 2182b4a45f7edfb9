"""Augmentation of image batches on the device, inside the compiled step. Nothing here imports more than jax and numpy.

What torchvision does to one Pillow image at a time, with the same pixels: RandomPerspective (bilinear, fill 0), then
RandomRotation (nearest, fill 0, about the centre). Random numbers and warps are apart: `draw_perspective` and
`draw_angles` are functions of a key alone, `warp_perspective` and `rotate` of their parameters alone. Colour images
are rotated, cropped and flipped: `rotate_crop_flip`. Beside the paper's augmentation: `resized_crop_flip`,
`color_jitter`, and `mix` (mixup and cutmix).
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
