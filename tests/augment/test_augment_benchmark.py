import runpy
from pathlib import Path

import jax
import numpy as np
import pillow_reference

from pspinal_jax.augment import augment, draw_warp

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "results" / "augmentation_and_pillow.py"))


def test_all_that_is_timed_computes_the_same(digits):
    images, key = digits[:256], jax.random.key(0)
    ours = augment(key, images)
    pillows = SCRIPT["pillow_warp"](*SCRIPT["pillow_arguments"](images, draw_warp(key, 256, 28, 28)))[..., None]
    for others in (pillows, np.asarray(SCRIPT["two_passes"](key, images))):
        share, largest = pillow_reference.differences(ours, others)
        assert share <= 1e-4
        assert largest <= 1


def test_rates_leave_out_the_first_round():
    calls, candidate = [], SCRIPT["Candidate"]
    rates = SCRIPT["measure"](
        [candidate("a", 10, lambda: calls.append("a")), candidate("b", 20, lambda: calls.append("b"))], 3
    )
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}
    assert all((values > 0).all() for values in rates.values())
