"""What a comparison tries: trial k's setting is a function of (seed, k), whatever else runs.

The points of all trials are those of an additive recurrence (M. Roberts, "The unreasonable effectiveness of
quasirandom sequences", 2018) behind a random shift: each is uniform by itself, and together they leave smaller gaps
than independent draws, which counts with 16 of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from pspinal_jax.errors import UsageError

Range = tuple[float, float]


class Setting(NamedTuple):
    """The hyper-parameters of one training, each a number or a float32 scalar array."""

    learning_rate: float
    weight_decay: float
    dropout_rate: float
    label_smoothing: float


Scaling = Literal["each", "all", "none"]
"""How features are standardised: each by its own mean and deviation, all by one of each, or not at all."""


class Trial(NamedTuple):
    """All that is drawn for a training: numbers, and how the features are standardised."""

    setting: Setting
    standardize: Scaling

    def as_json(self) -> dict[str, Any]:
        """As it stands in the files."""
        return {**self.setting._asdict(), "standardize": self.standardize}


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Lowest and highest value of each hyper-parameter; in between, their logarithms are uniform."""

    learning_rate: Range = (1e-4, 1e-2)
    weight_decay: Range = (1e-2, 3.0)
    dropout_rate: Range = (0.02, 0.6)
    label_smoothing: Range = (0.1, 0.1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            low, high = getattr(self, field.name)
            most = 1.0 if field.name in ("dropout_rate", "label_smoothing") else 1e6
            free = low == high == 0.0 and field.name != "learning_rate"  # a value of 0, not drawn
            if not free and not 0.0 < low <= high < most:
                raise UsageError(
                    f"{field.name.replace('_', '-')} is {low:g} .. {high:g}, expected 0 < LOW <= HIGH < {most:g}; both "
                    "alike for one value"
                )


_DIMENSIONS = len(Setting._fields) + 1


def _steps() -> np.ndarray:
    """Powers of 1 / g, where g > 1 solves g**(d + 1) = g + 1; for d = 1 the golden ratio."""
    g = 2.0
    for _ in range(64):
        g = (1.0 + g) ** (1.0 / (_DIMENSIONS + 1))
    return g ** -np.arange(1.0, _DIMENSIONS + 1)


def draw_trial(seed: int, trial: int, ranges: Ranges, scalings: Sequence[Scaling]) -> Trial:
    """Trial `trial`, counted from 0, of the comparison with `seed`; `scalings` are as likely, each."""
    shift = np.random.default_rng([seed, 18]).random(_DIMENSIONS)
    place = (shift + trial * _steps()) % 1.0
    values = []
    for name, share in zip(Setting._fields, place, strict=False):
        low, high = getattr(ranges, name)
        value = low if low == high else float(np.exp(np.log(low) + share * np.log(high / low)))
        values.append(float(f"{min(max(value, low), high):.6g}"))  # as it is shown: whoever types it in has it
    return Trial(Setting(*values), scalings[int(place[-1] * len(scalings))])


def training_seed(seed: int, kind: str, number: int) -> int:
    """Seed 0 .. 2**31 - 1 of all random numbers of a training: trial `number`, or final training `number`."""
    words = np.random.SeedSequence([seed, {"trial": 1, "seed": 2}[kind], number]).generate_state(1)
    return int(words[0] >> 1)
