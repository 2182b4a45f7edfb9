"""What is done to training examples on the device, beside `DataConfig.augment`."""

import dataclasses

from pspinal_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Mixing of examples, and strengths; everything here is off, or without effect, by default."""

    mixup: float = 0.0
    """Alpha of mixup: every training batch is blended with itself in another order, by a share drawn from Beta(alpha,
    alpha); 0 for none. Images and features."""
    cutmix: float = 0.0
    """Alpha of cutmix: a box of every training image comes from another one, of an area drawn from Beta(alpha, alpha);
    0 for none. With mixup too, each batch takes one of the two at random."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation of every training image are multiplied by numbers from 1 - this to 1 + this;
    0 for none. Colour or grey images."""
    min_area: float = 0.25
    """resized_crop_flip: the smallest part of the image's area that a crop may have; the largest is 1."""

    def __post_init__(self) -> None:
        for name, largest in (("mixup", 100.0), ("cutmix", 100.0), ("color_jitter", 1.0)):
            self._require(0.0 <= getattr(self, name) <= largest, name, f"0 .. {largest:g}")
        self._require(0.0 < self.min_area <= 1.0, "min_area", "above 0 and at most 1")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise UsageError(f"augment.{name} is {getattr(self, name)}, expected {expected}")
